"""Small questions that every reader of a bundle asks: which folder, which extents, do the bytes match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.disk.digest import FileRecord
from sdopt.disk.files import hash_file, resolve_inside
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName, vae_factor
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.model.shape import Extent


def bundle_extents(folder: Path, manifest: BundleManifest) -> Mapping[str, Extent]:
    """Sizes of the named axes of every component of a bundle."""
    return manifest.profile.axis_extents(vae_factor(read_config(folder, ComponentName.VAE_DECODER)))


def bundle_profiles(folder: Path, manifest: BundleManifest) -> tuple[Mapping[str, Extent], ...]:
    """The same for each of the bundle's profiles, in their order."""
    factor = vae_factor(read_config(folder, ComponentName.VAE_DECODER))
    return tuple(profile.axis_extents(factor) for profile in manifest.profiles)


def record_file(path: Path) -> FileRecord:
    return FileRecord(sha256=hash_file(path), size_bytes=path.stat().st_size)


def find_damage(folder: Path, files: Mapping[str, FileRecord], *, only: Iterable[str] | None = None) -> list[str]:
    """One sentence for each file that is missing, is a link, or differs from its record. Empty when all is well."""
    damage: list[str] = []
    for relative in files if only is None else only:
        path, record = resolve_inside(folder, relative), files[relative]
        if not path.is_file():
            damage.append(f"{relative} is missing")
        elif path.stat().st_size != record.size_bytes:
            damage.append(f"{relative} has {path.stat().st_size} bytes, not {record.size_bytes}")
        elif path.stat().st_nlink > 1 and path.name == WEIGHTS_NAME:
            damage.append(f"{relative} has several hard links, which ONNX runtimes refuse")
        elif hash_file(path) != record.sha256:
            damage.append(f"{relative} was changed: its SHA-256 differs from the manifest's")
    return damage


def require_intact(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `ArtifactError` naming every damaged file. Graphs and plans are opened only after this."""
    if damage := find_damage(folder, files):
        raise ArtifactError(
            f"{folder} is damaged: " + "; ".join(damage), hint="run the sdopt convert command that made it again"
        )
