"""How far each component of a candidate is from torch fp32, one run each on parity's seeded inputs.

torch runs in one child process and its outputs are kept; then a child process for each candidate opens its components
one after the other, so that memory is that of the largest.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ParityRecord
from sdopt.errors import ShapeError
from sdopt.fidelity.candidate import dump_settings, parse_settings
from sdopt.model.backend_settings import BackendSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    from sdopt.backends.protocol import ComponentFiles


@dataclass(frozen=True)
class ComponentError:
    """Of the output that is worst: |a-b|/|b|, the largest absolute difference, and the cosine. NaN, infinity or another
    shape has 1e30 and a cosine of -1.
    """

    relative_error: float
    max_error: float
    cosine: float


def run_reference_components(
    folder: Path,
    manifest: BundleManifest,
    names: Collection[ComponentName],
    outputs: Path,
    *,
    timeout_s: float | None = None,
) -> None:
    """Run torch fp32 on these components of a bundle, and keep inputs and outputs in the existing folder `outputs`."""
    arguments = {
        "folder": str(folder), "manifest": manifest.model_dump_json(), "names": list(names), "outputs": str(outputs),
    }  # fmt: skip
    call(run_torch, arguments, timeout_s=timeout_s)


def measure_components(
    folder: Path,
    manifest: BundleManifest,
    settings: BackendSettings | None,
    outputs: Path,
    *,
    label: str,
    timeout_s: float | None = None,
) -> dict[ComponentName, ComponentError]:
    """Run a candidate on what `run_reference_components` left in `outputs`. A component that torch did not run is left
    out, as is one that takes no inputs of these shapes: another bundle may have other sizes.
    """
    arguments = {
        "folder": str(folder),
        "manifest": manifest.model_dump_json(),
        "settings": dump_settings(settings),
        "outputs": str(outputs),
        "label": label,
    }
    outcome = call(run_candidate, arguments, timeout_s=timeout_s)
    return {ComponentName(name): ComponentError(**values) for name, values in outcome.value.items()}


def run_torch(arguments: JsonTable) -> JsonTable:
    """Entry of the first child."""
    from safetensors.torch import save_file

    from sdopt.backends.component_files import component_files
    from sdopt.fidelity.origin import find_origin
    from sdopt.trace.reference import load_reference, run_reference
    from sdopt.trace.seeded_inputs import make_inputs
    from sdopt.weights.safetensors_header import read_header

    folder, outputs = Path(arguments["folder"]), Path(arguments["outputs"])
    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    origin = find_origin(manifest)
    names = [ComponentName(name) for name in arguments["names"]]
    for done, name in enumerate(names):
        progress.update(f"torch fp32 runs {name}", done / len(names))
        files = component_files(folder, manifest, name)
        inputs = make_inputs(files.spec, files.config, files.extents)
        save_file(inputs, outputs / f"{name}-inputs.safetensors")
        network = load_reference(files.spec, files.config, origin.get(name) or read_header(files.weights).tensors)
        run_reference(network, files.spec, inputs, outputs / f"{name}.safetensors")
        del network
        gc.collect()
    return {}


def run_candidate(arguments: JsonTable) -> JsonTable:
    """Entry of the second child: a table of `ComponentError` by component."""
    from sdopt.backends.component_files import component_files
    from sdopt.fidelity.origin import find_origin
    from sdopt.machine.environment import find_machine
    from sdopt.preflight.plan_choice import choose_plans

    folder, outputs = Path(arguments["folder"]), Path(arguments["outputs"])
    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    settings = parse_settings(arguments["settings"])
    plans = choose_plans(folder, manifest, find_machine()) if settings is None else {}
    origin = find_origin(manifest) if isinstance(settings, TorchSettings) else {}
    errors: JsonTable = {}
    for done, (name, record) in enumerate(manifest.components.items()):
        progress.update(f"{arguments['label']} runs {name}", done / len(manifest.components))
        files = component_files(folder, manifest, name, plans.get(name, ()), origin.get(name))
        if (parity := _compare(files, settings or record.backend, outputs)) is not None:
            errors[name] = _find_worst(parity)
        gc.collect()
    return errors


def _compare(files: ComponentFiles, settings: BackendSettings, outputs: Path) -> ParityRecord | None:
    """Run a component on torch's inputs; None where torch ran none, or one of other inputs."""
    from safetensors.torch import load_file

    from sdopt.backends.open import open_session
    from sdopt.trace.compare_outputs import compare_outputs
    from sdopt.weights.to_torch import TORCH_DTYPES

    if not (outputs / f"{files.name}.safetensors").is_file():
        return None
    given = load_file(outputs / f"{files.name}-inputs.safetensors")
    expected = load_file(outputs / f"{files.name}.safetensors")
    if given.keys() != {t.name for t in files.spec.inputs} or expected.keys() != {t.name for t in files.spec.outputs}:
        return None
    inputs = {tensor.name: given[tensor.name].to(TORCH_DTYPES[tensor.dtype]) for tensor in files.spec.inputs}
    with open_session(files, settings) as session:
        try:
            results = session.run(inputs)
        except ShapeError:
            return None
        found = {name: value.float().cpu() for name, value in results.items()}
    return compare_outputs(files.spec, expected, found, runtime=settings.kind, graph_dtype=DType.FP32)


def _find_worst(parity: ParityRecord) -> JsonTable:
    return {
        "relative_error": max(output.relative_l2 for output in parity.outputs),
        "max_error": max(output.max_abs for output in parity.outputs),
        "cosine": max(-1.0, 1.0 - max(output.cosine_distance for output in parity.outputs)),
    }
