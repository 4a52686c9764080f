"""Bundles whose files are links, as in a hub's cache: `snapshots/REVISION/unet/model.onnx` -> `../../../blobs/DIGEST`.

ONNX runtimes refuse weights behind links, and what a link points to may change between a check and the opening. So such
a bundle is opened as a copy of one's own, made once in the cache, in which every byte has been hashed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sdopt.bundle.manifest import BundleManifest, parse_manifest
from sdopt.disk.digest import FileRecord
from sdopt.disk.files import disk_errors, fsync_file, fsync_folder, hash_file, require_free_disk, require_relative
from sdopt.disk.store import cache_root
from sdopt.errors import ArtifactError
from sdopt.model.file_names import CARD_NAME, MANIFEST_NAME


def open_links(folder: Path) -> Path:
    """The folder itself where nothing of the bundle is a link, and else a copy with the same bytes in the cache.

    Raises `ArtifactError` where a link leads to nothing or to bytes that are not the manifest's, and `MissingHardware`
    where the disk is too small for the copy.
    """
    place = folder / MANIFEST_NAME
    if not place.is_file():
        return folder  # whoever reads the manifest says what is wrong
    manifest = parse_manifest(folder)
    for name in manifest.files:
        require_relative(folder, name)
    if not any(_is_linked(folder, name) for name in (MANIFEST_NAME, *manifest.files)):
        return folder
    copy = cache_root() / "linked-bundles" / hash_file(place)
    if not (copy / MANIFEST_NAME).is_file():
        _copy_bundle(folder, manifest, copy)
    return copy


def _is_linked(folder: Path, name: str) -> bool:
    """Whether the file, or a folder on the way to it inside of the bundle, is a link."""
    path = folder / name
    return any(each.is_symlink() for each in (path, *path.parents[: len(Path(name).parts) - 1]))


def _copy_bundle(folder: Path, manifest: BundleManifest, target: Path) -> None:
    require_free_disk(target.parent, sum(record.size_bytes for record in manifest.files.values()))
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
        try:
            for name, record in manifest.files.items():
                if name != CARD_NAME:
                    _copy_file(folder, name, record, temporary / name)
            shutil.copyfile(folder / MANIFEST_NAME, temporary / MANIFEST_NAME)
            fsync_file(temporary / MANIFEST_NAME)
            fsync_folder(temporary)
            if not (target / MANIFEST_NAME).is_file():
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_file(folder: Path, name: str, record: FileRecord, target: Path) -> None:
    source = (folder / name).resolve()
    if not source.is_file():
        raise ArtifactError(f"{folder} is damaged: {name} is missing", hint="download the bundle again")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    fsync_file(target)
    if hash_file(target) != record.sha256:  # of the copy: the source may be written to meanwhile
        raise ArtifactError(
            f"{folder} is damaged: {name} links to {source}, whose SHA-256 differs from the manifest's",
            hint="download the bundle again",
        )
