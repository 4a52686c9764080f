"""Files on the disk against the records that a bundle or a journal holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sdopt.disk.digest import FileRecord
from sdopt.disk.files import hash_file, resolve_inside
from sdopt.model.file_names import WEIGHTS_NAME


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
