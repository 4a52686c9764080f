"""Folders for other tools: whole or not there, and never in the place of what sdopt did not make."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sdopt._version import __version__
from sdopt.bundle.damage import require_pipeline
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.disk.digest import digest_of
from sdopt.disk.files import disk_errors, require_free_disk, resolve_inside, write_file
from sdopt.disk.staging import require_place, swap_in
from sdopt.errors import ArtifactError
from sdopt.preflight.runnable import require_sound

MARKER_NAME = "sdopt-export.json"


def open_bundle(folder: Path) -> BundleManifest:
    """The manifest of a bundle that is sound and can draw. Raises `ArtifactError` or `UnsafeInputError`."""
    manifest = read_manifest(folder)
    require_pipeline(folder, manifest)
    require_sound(folder, manifest)
    return manifest


@contextmanager
def staged(output: Path, kind: str, manifest: BundleManifest, needed_bytes: int) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and vanishes when it fails.

    Raises `ArtifactError` where `output` holds anything but an earlier export of the same kind, and `MissingHardware`
    where the disk has no room for `needed_bytes`.
    """
    output = output.absolute()
    _require_ours(output, kind)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        require_free_disk(output.parent, needed_bytes)
        root = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.sdopt-export."))
        retired = root / "retired"
        try:
            growing = root / "export"
            growing.mkdir()
            yield growing
            marker = {"kind": kind, "sdopt": __version__, "bundle": digest_of(manifest.model_dump(mode="json"))}
            write_file(growing / MARKER_NAME, (json.dumps(marker, indent=1) + "\n").encode())
            swap_in(growing, output, retired)
        finally:
            if retired.exists() and not output.exists():
                retired.rename(output)
            shutil.rmtree(root, ignore_errors=True)


def copy_file(folder: Path, relative: str, target: Path) -> None:
    """A real copy, never a link: ONNX runtimes refuse weight files with several names."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolve_inside(folder, relative), target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def sum_bytes(manifest: BundleManifest, files: Iterable[str]) -> int:
    return sum(manifest.files[name].size_bytes for name in files)


def _require_ours(output: Path, kind: str) -> None:
    require_place(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        found = json.loads((output / MARKER_NAME).read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ArtifactError(
            f"{output} is not empty, and is not an earlier sdopt export {kind}", hint="choose another folder with -o"
        )
