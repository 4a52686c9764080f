"""Small questions that every reader of a bundle asks: which extents, do the bytes match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdopt.bundle.again import again_command
from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.disk.digest import FileRecord
from sdopt.disk.file_records import find_damage
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName, vae_factor
from sdopt.model.shape import Extent


def bundle_extents(folder: Path, manifest: BundleManifest) -> Mapping[str, Extent]:
    """Sizes of the named axes of every component of a bundle."""
    return manifest.profile.axis_extents(vae_factor(read_config(folder, ComponentName.VAE_DECODER)))


def bundle_profiles(folder: Path, manifest: BundleManifest) -> tuple[Mapping[str, Extent], ...]:
    """The same for each of the bundle's profiles, in their order."""
    factor = vae_factor(read_config(folder, ComponentName.VAE_DECODER))
    return tuple(profile.axis_extents(factor) for profile in manifest.profiles)


def require_intact(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `ArtifactError` naming every damaged file. Graphs and plans are opened only after this."""
    if damage := find_damage(folder, files):
        raise ArtifactError(
            f"{folder} is damaged: " + "; ".join(damage), hint=f"build it again: {again_command(folder)}"
        )
