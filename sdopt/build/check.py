"""`sdopt check`: every digest, every shape, and whether this machine can run the bundle."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from sdopt import progress
from sdopt.artifacts.bundle import bundle_extents, find_damage
from sdopt.artifacts.manifest import BundleManifest, ComponentRecord, Verdict, read_manifest
from sdopt.artifacts.safetensors_file import read_header
from sdopt.errors import ArtifactError, EnvironmentMissingError, SdoptError
from sdopt.graph.audit import check_graph_file
from sdopt.model.component import TensorSpec
from sdopt.model.recipe import BuildRecipe
from sdopt.model.shape import Extent
from sdopt.pipeline.preflight import require_runnable


@dataclass(frozen=True)
class CheckReport:
    """`problems` are damage, `missing` is what this machine lacks; both empty means that the bundle runs here."""

    folder: Path
    manifest: BundleManifest
    problems: tuple[str, ...]
    missing: str
    remedy: str

    @property
    def sentence(self) -> str:
        if self.problems:
            return f"{self.folder} is damaged: {'; '.join(self.problems)}"
        if self.missing:
            return f"{self.folder} is whole, and this machine cannot run it: {self.missing}"
        verdict = self.manifest.fidelity.verdict
        faithful = "draws what torch draws" if verdict is Verdict.PASS else f"fidelity: {verdict}"
        return f"{self.folder} is whole, runs on this machine, and {faithful}"


def check_bundle(folder: Path) -> CheckReport:
    """Read every byte of a bundle and compare it with the manifest. Raises `ArtifactError` for what is no bundle."""
    manifest = read_manifest(folder)
    problems: list[str] = []
    for count, name in enumerate(manifest.files):
        progress.update("checking the files", count / len(manifest.files))
        problems += find_damage(folder, manifest.files, only=[name])
    if not problems:
        try:
            extents = bundle_extents(folder, manifest)
            for component, record in manifest.components.items():
                problems += _check_component(folder / component, record, extents)
        except SdoptError as error:
            problems.append(error.message)
    remedy = rebuild_command(manifest.recipe, folder) if problems else ""
    missing = ""
    if not problems:
        try:
            require_runnable(manifest)
        except EnvironmentMissingError as error:
            missing, remedy = error.message, error.hint
    return CheckReport(folder, manifest, tuple(problems), missing, remedy)


def rebuild_command(recipe: BuildRecipe, folder: Path) -> str:
    """The command line that makes a bundle again; settings that have no option are left to the recipe's defaults."""
    flags = {"target": recipe.target, "precision": recipe.precision, "size": recipe.size, "batch": recipe.batch,
             "vae": recipe.vae}  # fmt: skip
    defaults = BuildRecipe()
    words = ["sdopt", "convert", recipe.source, "-o", str(folder)]
    for name, value in flags.items():
        if value != getattr(defaults, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words if recipe.verify.enabled else [*words, "--no-verify"])


def _check_component(folder: Path, record: ComponentRecord, extents: Mapping[str, Extent]) -> list[str]:
    graph = check_graph_file(folder / "model.onnx").graph
    read_header(folder / "weights.safetensors")
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
    """Raise what the report found: `ArtifactError` for damage, `EnvironmentMissingError` for this machine."""
    if report.problems:
        raise ArtifactError(report.sentence, hint=report.remedy)
    if report.missing:
        raise EnvironmentMissingError(report.sentence, hint=report.remedy)
