"""Where in the network the error comes from: by component for every candidate, and with `--layers` by layer of engines.

Both run after the times are taken. What fails leaves an empty table and says why; the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sdopt.bench.case.candidates import Candidate
from sdopt.bench.case.report import CandidateKind, ComponentErrorRecord, LayerRecord, Scope
from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import SdoptError
from sdopt.fidelity.components import measure_components, run_reference_components
from sdopt.fidelity.layer_errors import compare_layers
from sdopt.model.component import ComponentName


@dataclass(frozen=True)
class ErrorTables:
    """By candidate: its components' errors, and why it has none."""

    errors: Mapping[str, dict[ComponentName, ComponentErrorRecord]]
    messages: Mapping[str, str]


@dataclass(frozen=True)
class LayerTables:
    """The layers of all components in the order of their graphs. `remark` says what ran them where that is not the
    engines' own runtime, and which component could not be compared, and why.
    """

    layers: tuple[LayerRecord, ...]
    remark: str = ""


def measure_component_errors(
    folder: Path, manifest: BundleManifest, candidates: Sequence[Candidate], scope: Scope, work: Path, timeout_s: float
) -> ErrorTables:
    """Hold the components that `scope` covers of each candidate against torch fp32 on the weights of the measured
    bundle in `folder`.

    A peer shows no components and is left out. `timeout_s` is for each process.
    """
    outputs = work / "components"
    outputs.mkdir()
    asked = [candidate for candidate in candidates if candidate.kind is not CandidateKind.PEER]
    try:
        names = (ComponentName.UNET,) if scope is Scope.UNET else tuple(manifest.components)
        run_reference_components(folder, manifest, names, outputs, timeout_s=timeout_s)
    except SdoptError as error:
        return ErrorTables({}, {candidate.name: f"torch fp32: {error.message}" for candidate in asked})
    errors: dict[str, dict[ComponentName, ComponentErrorRecord]] = {}
    messages: dict[str, str] = {}
    for candidate in asked:
        try:
            found = measure_components(
                candidate.folder, candidate.manifest, candidate.settings, outputs, label=candidate.label,
                timeout_s=timeout_s,
            )  # fmt: skip
        except SdoptError as error:
            messages[candidate.name] = error.message
        else:
            errors[candidate.name] = {name: ComponentErrorRecord(**asdict(value)) for name, value in found.items()}
    return ErrorTables(errors, messages)


def measure_layers(folder: Path, manifest: BundleManifest, work: Path, timeout_s: float) -> LayerTables:
    """Compare the engines of a bundle layer by layer, for `--layers`. `timeout_s` is for each process."""
    records: list[LayerRecord] = []
    remarks: list[str] = []
    elsewhere: dict[str, list[str]] = {}
    for name in manifest.components:
        try:
            compared = compare_layers(folder, manifest, name, work, timeout_s=timeout_s)
        except SdoptError as error:
            remarks.append(f"{name} was not compared: {error.message}")
            continue
        records += [LayerRecord(component=name, **asdict(layer)) for layer in compared.layers]
        if compared.runtime:
            elsewhere.setdefault(compared.runtime, []).append(name)
    for runtime, names in elsewhere.items():
        remarks.append(f"plans show no values from within: the graphs of {', '.join(names)} ran on {runtime}")
    return LayerTables(tuple(records), "; ".join(remarks))


def find_first_parting(layers: Sequence[LayerRecord]) -> LayerRecord | None:
    """The first layer that differs by more than rounding explains."""
    return next((layer for layer in layers if layer.relative_error > layer.tolerance), None)
