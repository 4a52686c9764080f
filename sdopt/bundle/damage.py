"""Small questions that every reader of a bundle asks: does it draw, do the bytes match."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from sdopt.bundle.again import again_command
from sdopt.bundle.manifest import BundleKind, BundleManifest
from sdopt.disk.digest import FileRecord
from sdopt.disk.file_records import find_damage
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family

_ALWAYS = frozenset({ComponentName.UNET, ComponentName.VAE_DECODER})
_REQUIRED = {
    Family.SD1: _ALWAYS | {ComponentName.TEXT_ENCODER},
    Family.SD2: _ALWAYS | {ComponentName.TEXT_ENCODER},
    Family.SDXL: _ALWAYS | {ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2},
    Family.SDXL_REFINER: _ALWAYS | {ComponentName.TEXT_ENCODER_2},
}


def require_pipeline(
    folder: Path, manifest: BundleManifest, components: Collection[ComponentName] | None = None
) -> None:
    """Raise `ArtifactError` for a bundle that does not draw by itself: of another kind, or without a network.

    `components` are those that are there, by default all that the manifest names.
    """
    if manifest.kind is not BundleKind.PIPELINE:
        raise ArtifactError(
            f"{folder} is {manifest.kind.label}, and not a whole pipeline: it does not draw by itself",
            hint="give the bundle of a whole model",
        )
    if missing := _REQUIRED[manifest.family] - set(manifest.components if components is None else components):
        raise ArtifactError(
            f"{folder} is not a whole pipeline: it lacks {', '.join(sorted(missing))}",
            hint=f"build it again: {again_command(folder)}",
        )


def require_intact(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise `ArtifactError` naming every damaged file. Graphs and plans are opened only after this."""
    if damage := find_damage(folder, files):
        raise ArtifactError(
            f"{folder} is damaged: " + "; ".join(damage), hint=f"build it again: {again_command(folder)}"
        )
