"""Whether the bundle at the output is already what would be built, without reading gigabytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import QuantizationRecord
from sdopt.convert.plan import BuildPlan
from sdopt.convert.plans.wanted import library_version
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.disk.file_records import find_damage
from sdopt.disk.files import resolve_inside
from sdopt.disk.store import Store
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.quantization import QuantizationSettings

# Larger files are read again only when their size, their times or their place on the disk are other than when their
# digest was last found right.
_SMALL_FILE_BYTES = 16_000_000
_STAGE = "whole-files"


def find_finished(plan: BuildPlan, output: Path, store: Store, *, read_all: bool = False) -> BundleManifest | None:
    """The bundle at `output`, where it is exactly what would be built and no file of it is damaged.

    Small files are hashed. Large ones are hashed once, and again when the file system shows that they were written to;
    with `read_all` they are hashed in any case, as mending a damaged bundle needs it.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(output)
    except ArtifactError:
        return None
    if not _is_wanted(plan, output, manifest):
        return None
    progress.update("checking the bundle that is there", 0.0)
    return manifest if _is_whole(output, manifest.engine_files, store, read_all=read_all) else None


def vouch_for(folder: Path, files: Mapping[str, FileRecord], store: Store) -> None:
    """Remember that these files were found to have their digests, or were just written with them."""
    for name, record in files.items():
        if record.size_bytes > _SMALL_FILE_BYTES and (key := _voucher(folder, name, record)) is not None:
            store.put(_STAGE, key, {"file.txt": str(resolve_inside(folder, name)).encode()})


def _is_wanted(plan: BuildPlan, output: Path, manifest: BundleManifest) -> bool:
    return (
        manifest.recipe == plan.recipe
        and manifest.name == output.name
        and manifest.components.keys() == plan.components.keys()
        and all(
            (record.architecture, record.weights_key, record.backend)
            == (plan.components[name].architecture, plan.components[name].weights_key, plan.components[name].backend)
            and all(made.version == library_version(plan) for made in record.every_plan)
            and (not name.is_text_encoder or (record.slots is not None and record.slots.words is not None))
            and _is_quantized_alike(plan.quantization, name, record.quantization)
            for name, record in manifest.components.items()
        )
    )


def _is_whole(folder: Path, files: Mapping[str, FileRecord], store: Store, *, read_all: bool) -> bool:
    to_read = [name for name, record in files.items() if read_all or not _is_vouched(folder, name, record, store)]
    if find_damage(folder, files, only=to_read):
        return False
    vouch_for(folder, {name: files[name] for name in to_read}, store)
    return True


def _is_vouched(folder: Path, name: str, record: FileRecord, store: Store) -> bool:
    if record.size_bytes <= _SMALL_FILE_BYTES:
        return False
    key = _voucher(folder, name, record)
    return key is not None and store.find(_STAGE, key) is not None


def _voucher(folder: Path, name: str, record: FileRecord) -> str | None:
    """A digest of what the file system shows of a file beside the digest that its bytes had; None where it is gone.

    The time of the last change to the inode is in it, which no program can set: an edit that puts the other times back
    is seen. A second hard link changes it as well, and the file is then read once more.
    """
    try:
        path = resolve_inside(folder, name)
        seen = path.lstat()
    except (OSError, ArtifactError):
        return None
    return digest_of([str(path), record.sha256, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino])


def _is_quantized_alike(
    settings: QuantizationSettings | None, name: ComponentName, record: QuantizationRecord | None
) -> bool:
    wanted = settings.components.get(name) if settings is not None else None
    if wanted is None or record is None or settings is None:
        return wanted is None and record is None
    return (record.settings, record.calibration, record.error_limit) == (
        wanted, settings.calibration, settings.held_out_error
    )  # fmt: skip
