"""The folder beside the output in which a bundle grows, and the one rename that publishes it.

A build that was killed leaves the staging folder; the next run of the same command finds in its journal which weight
files are whole, and goes on.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sdopt.disk.digest import FileRecord, digest_of
from sdopt.disk.file_records import find_damage
from sdopt.disk.files import disk_errors, fsync_folder, require_writable, write_file
from sdopt.disk.locks import locked
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName
from sdopt.model.file_names import MANIFEST_NAME, WEIGHTS_NAME

_JOURNAL_NAME = "journal.json"


class _Journal(BaseModel):
    """Weight files that are whole, by component: the key that they were made under, and their record."""

    model_config = ConfigDict(extra="forbid")
    weights: dict[ComponentName, tuple[str, FileRecord]] = {}


def require_place(output: Path) -> None:
    """Raise `ArtifactError` where no folder can be put at `output`: a file or a link is there or in the way, or the
    system forbids it.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ArtifactError(f"{output} is not a folder", hint="choose another with -o")
    if os.path.ismount(os.path.abspath(output)):  # Path(".").is_mount() says that every folder is one
        raise ArtifactError(
            f"{output} is a mount point, which a finished folder cannot replace",
            hint=f"choose a folder inside: -o {shlex.quote(str(output / 'bundle'))}",
        )
    if any(parent.exists() and not parent.is_dir() for parent in output.parents):
        raise ArtifactError(f"{output} cannot be made: a file is in its way", hint="choose another with -o")
    if not output.exists():
        require_writable(output)


def require_ours(output: Path) -> None:
    """Raise `ArtifactError` where `output` is not a place for a bundle, or holds something that sdopt did not make."""
    require_place(output)
    if output.is_dir() and not (output / MANIFEST_NAME).is_file() and any(output.iterdir()):
        raise ArtifactError(f"{output} is not empty, and was not made by sdopt", hint="choose another folder with -o")


class Staging:
    """`root` holds the growing bundle in `folder` and the journal beside it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output.parent / f".{output.name}.sdopt-partial"
        self.folder = self.root / "bundle"
        self.work = self.root / "work"
        with disk_errors(self.root):
            for folder in (self.folder, self.work):
                folder.mkdir(parents=True, exist_ok=True)
        self._restore_retired()
        self._journal = _read_journal(self.root)
        self.reused_weights = False

    @classmethod
    def peek_weights(cls, output: Path, name: ComponentName, key: str) -> bool:
        """Whether a killed run left this weight file whole; makes no folder."""
        root = output.parent / f".{output.name}.sdopt-partial"
        found = _read_journal(root).weights.get(name)
        return found is not None and found[0] == key and (root / "bundle" / name / WEIGHTS_NAME).is_file()

    def find_weights(self, name: ComponentName, key: str) -> FileRecord | None:
        """The record of a weight file that a killed run finished under the same key."""
        found = self._journal.weights.get(name)
        if found is None or found[0] != key:
            return None
        # Parity and fidelity are kept by this digest: it must be that of the file as it is now.
        relative = f"{name}/{WEIGHTS_NAME}"
        if find_damage(self.folder, {relative: found[1]}):
            return None
        self.reused_weights = True
        return found[1]

    def note_weights(self, name: ComponentName, key: str, record: FileRecord) -> None:
        self._journal.weights[name] = (key, record)
        write_file(self.root / _JOURNAL_NAME, self._journal.model_dump_json().encode())

    def publish(self) -> None:
        """Put the bundle in its place: what was there goes only when the new one is whole."""
        retired = self.root / "retired"
        with disk_errors(self.output):
            shutil.rmtree(retired, ignore_errors=True)
            swap_in(self.folder, self.output, retired)
            shutil.rmtree(self.root, ignore_errors=True)

    def _restore_retired(self) -> None:
        """Undo a publication that was killed between its two renames."""
        retired = self.root / "retired"
        if retired.is_dir() and not self.output.exists():
            retired.rename(self.output)


def swap_in(growing: Path, output: Path, retired: Path) -> None:
    """Put a finished folder in its place by renames; what was there is at `retired` afterwards. Raises `OSError`."""
    for folder, _, _ in os.walk(growing, topdown=False):
        fsync_folder(Path(folder))
    if output.exists():
        output.rename(retired)
    growing.rename(output)
    fsync_folder(output.parent)


def _read_journal(root: Path) -> _Journal:
    try:
        return _Journal.model_validate_json((root / _JOURNAL_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return _Journal()


@contextmanager
def locked_output(output: Path, cache: Path) -> Iterator[None]:
    """One build of an output at a time: a second waits, and then finds the work done."""
    path = cache / "locks" / digest_of(str(output.absolute()))
    with disk_errors(path), locked(path, waiting=f"waiting for another sdopt that builds {output}"):
        yield


def drop_unknown(folder: Path, known: set[str]) -> None:
    """Remove what an earlier, different run left in the staging folder. `known` are relative POSIX paths."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in known:
            path.unlink()
