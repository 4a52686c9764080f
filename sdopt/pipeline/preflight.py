"""What must hold before a runtime sees a byte of a bundle.

A graph tells a runtime which files to map and where: it is opened only when its digest is the manifest's and its
external data are plain ranges of plain files beside it.
"""

from __future__ import annotations

from pathlib import Path

from sdopt.artifacts.bundle import find_damage
from sdopt.artifacts.files import resolve_inside
from sdopt.artifacts.manifest import BundleManifest
from sdopt.backends.open import probe_backend
from sdopt.errors import ArtifactError, MissingDependency, MissingHardware
from sdopt.graph.audit import check_graph_file

_WEIGHTS_SUFFIX = "/weights.safetensors"


def require_sound(folder: Path, manifest: BundleManifest) -> None:
    """Check every small file by its digest, weight files by their size, and where graphs point.

    Hashing gigabytes at each load would double its time; `sdopt check` does it. Raises `ArtifactError` naming all that
    is damaged, and `UnsafeInputError` for a graph that names a place outside its folder.
    """
    small = [name for name in manifest.files if not name.endswith(_WEIGHTS_SUFFIX)]
    damage = find_damage(folder, manifest.files, only=small)
    for name, record in manifest.files.items():
        path = resolve_inside(folder, name)
        if name.endswith(_WEIGHTS_SUFFIX) and (not path.is_file() or path.stat().st_size != record.size_bytes):
            damage.append(f"{name} is missing or truncated")
    if damage:
        raise ArtifactError(
            f"{folder} is damaged: {'; '.join(damage)}", hint="run the sdopt convert command that made it again"
        )
    for component in manifest.components:
        if f"{component}/model.onnx" not in manifest.files:
            raise ArtifactError(f"{folder}: the manifest names no graph of {component}")
        check_graph_file(folder / component / "model.onnx")


def require_runnable(manifest: BundleManifest) -> None:
    """Raise `EnvironmentMissingError` where this machine lacks a runtime or the arithmetic that an engine needs."""
    for name, record in manifest.components.items():
        probe = probe_backend(record.backend)
        if not probe.available:
            raise MissingDependency(f"{name} needs {record.backend.kind}: {probe.missing}", hint=probe.remedy)
        if record.precision not in probe.precisions:
            raise MissingHardware(
                f"{name} computes in {record.precision}, which {record.backend.kind} cannot on this processor",
                hint="convert again here: sdopt convert MODEL --precision fp32",
            )
