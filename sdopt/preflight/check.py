"""`sdopt check`: every digest, every shape, and whether this machine may and can run the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from sdopt import progress
from sdopt.bundle.again import again_command
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import ComponentRecord, Verdict
from sdopt.bundle.trust import parse_digest, remember_named
from sdopt.disk.file_records import find_damage
from sdopt.errors import ArtifactError, EnvironmentMissingError, SdoptError, UnsafeInputError
from sdopt.graph.external_data import check_graph_file
from sdopt.machine.environment import Machine
from sdopt.model.component import ComponentName, TensorSpec
from sdopt.model.file_names import CARD_NAME, GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME
from sdopt.model.shape import Extent
from sdopt.preflight.runnable import find_bad_plans, require_runnable, require_trusted
from sdopt.weights.safetensors_header import read_header

_SHOWN = 5


@dataclass(frozen=True)
class CheckReport:
    """What keeps the bundle from running here, the first of three: `problems` are damage, `untrusted` that its plans
    came from elsewhere, `missing` is what this machine lacks. All empty means that it runs.

    `plans` are the files that TensorRT would open here, by component.
    """

    folder: Path
    manifest: BundleManifest
    problems: tuple[str, ...] = ()
    untrusted: str = ""
    missing: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()
    """What is worth a word and keeps nothing from running."""
    plans: Mapping[ComponentName, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        if self.problems:
            return f"{self.folder} is damaged: {'; '.join(self.problems)}"
        if self.untrusted:
            return self.untrusted
        if self.missing:
            return f"{self.folder} is whole, and this machine cannot run it: {self.missing}"
        verdict = self.manifest.fidelity.verdict
        faithful = "draws what torch draws" if verdict is Verdict.PASS else f"fidelity: {verdict}"
        return f"{self.folder} is whole, runs on this machine, and {faithful}"


def check_bundle(folder: Path, *, trust_engines: Iterable[str] = (), machine: Machine | None = None) -> CheckReport:
    """Read every byte of a bundle and compare it with the manifest, then ask whether this machine may and can run it.

    Plans of a whole bundle that `trust_engines` names (SHA-256 of a plan or of `bundle.json`) are trusted from now on.
    No runtime library sees a byte of the bundle. `machine` is this one by default. Raises `ArtifactError` for what is
    not a bundle, and `UsageError` for what is not a digest.
    """
    named = tuple(parse_digest(word) for word in trust_engines)
    folder = open_links(folder)
    manifest = read_manifest(folder)
    if problems := _find_problems(folder, manifest):
        return CheckReport(folder, manifest, tuple(problems), remedy=again_command(folder))
    try:
        require_trusted(folder, manifest, named)
    except UnsafeInputError as error:
        return CheckReport(folder, manifest, untrusted=error.message, remedy=error.hint)
    remember_named(folder, manifest, named)
    try:
        chosen = require_runnable(folder, manifest, machine)
    except EnvironmentMissingError as error:
        return CheckReport(folder, manifest, missing=error.message, remedy=error.hint)
    plans = {name: tuple(dict.fromkeys(plan.file for plan in of)) for name, of in chosen.items()}
    return CheckReport(folder, manifest, notes=tuple(_find_notes(folder, manifest)), plans=plans)


def _find_notes(folder: Path, manifest: BundleManifest) -> Iterator[str]:
    """The card where it is not the one that was written, and files that the manifest does not know."""
    card = {name: record for name, record in manifest.files.items() if name == CARD_NAME}
    yield from find_damage(folder, card)
    known = {MANIFEST_NAME, CARD_NAME, *manifest.files}
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    extra = sorted(name for path in found if (name := path.relative_to(folder).as_posix()) not in known)
    if extra:
        more = f" and {len(extra) - _SHOWN} more" if len(extra) > _SHOWN else ""
        yield f"the manifest does not know {', '.join(extra[:_SHOWN])}{more}: no engine reads it"


def _find_problems(folder: Path, manifest: BundleManifest) -> list[str]:
    """Damage first: what a damaged file says of itself is not looked at."""
    problems: list[str] = []
    for count, name in enumerate(manifest.engine_files):
        progress.update("checking the files", count / len(manifest.engine_files))
        problems += find_damage(folder, manifest.files, only=[name])
    if problems:
        return problems
    try:
        extents = manifest.extents
        for component, record in manifest.components.items():
            problems += _check_component(folder / component, record, extents)
        problems += find_bad_plans(folder, manifest)
    except SdoptError as error:
        problems.append(error.message)
    return problems


def _check_component(folder: Path, record: ComponentRecord, extents: Mapping[str, Extent]) -> list[str]:
    graph = check_graph_file(folder / GRAPH_NAME).graph
    read_header(folder / WEIGHTS_NAME)
    problems: list[str] = []
    for kind, specs, values in (
        ("input", record.spec.inputs, graph.input),
        ("output", record.spec.outputs, graph.output),
    ):
        found = {value.name: value for value in values}
        if found.keys() != {spec.name for spec in specs}:
            problems.append(f"{folder.name}: the graph's {kind}s are {', '.join(found)}")
            continue
        problems += [
            f"{folder.name}: {kind} {spec.name} does not have the shape that the manifest says"
            for spec in specs
            if not _fits(spec, found[spec.name], extents)
        ]
    return problems


def _fits(spec: TensorSpec, value: onnx.ValueInfoProto, extents: Mapping[str, Extent]) -> bool:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(spec.axes):
        return False
    for axis, dim in zip(spec.axes, dims, strict=True):
        extent = Extent.static(axis) if isinstance(axis, int) else extents[axis]
        # A dynamic axis is a name or nothing in the graph.
        if dim.HasField("dim_value") and not (extent.is_static and dim.dim_value == extent.opt):
            return False
    return True


def require_whole(report: CheckReport) -> None:
    """Raise what the report found: `ArtifactError` for damage, `UnsafeInputError` for plans that nobody vouched for,
    `EnvironmentMissingError` for this machine.
    """
    if report.problems:
        raise ArtifactError(report.sentence, hint=report.remedy)
    if report.untrusted:
        raise UnsafeInputError(report.sentence, hint=report.remedy)
    if report.missing:
        raise EnvironmentMissingError(report.sentence, hint=report.remedy)
