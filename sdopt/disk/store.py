"""The content-addressed store: what a stage made, under the digest of everything that decided it.

An entry is a folder that appears by one rename, with `entry.json` naming the digest of each of its files. An entry that
does not match its digests is thrown away and made again. Two processes that make the same entry both succeed: the
second finds the first's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sdopt.disk.files import disk_errors, fsync_file, fsync_folder, hash_file
from sdopt.disk.locks import locked

_ENTRY_NAME = "entry.json"

Fill = Callable[[Path], Mapping[str, str]]
"""Writes files into a folder, and returns their SHA-256 by name."""


def cache_root() -> Path:
    """Where sdopt keeps what it can make again: $SDOPT_CACHE, or sdopt in the user's cache folder."""
    if chosen := os.environ.get("SDOPT_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "sdopt"


class Store:
    """Entries by (stage, key); a key is 64 hex digits, the digest of what the entry depends on."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = (root or cache_root()) / "store"
        self._new: set[tuple[str, str]] = set()
        self._reused: set[str] = set()

    @property
    def reused(self) -> tuple[str, ...]:
        """Stages of which this object found an entry that it had neither missed nor put before."""
        return tuple(sorted(self._reused))

    def find(self, stage: str, key: str) -> Path | None:
        """The folder of an entry whose every file matches its digest, or None."""
        folder = self._place(stage, key)
        if not _is_intact(folder):
            self._new.add((stage, key))
            return None
        if (stage, key) not in self._new:
            self._reused.add(stage)
        return folder

    def put(self, stage: str, key: str, files: Mapping[str, bytes]) -> Path:
        """Add an entry and return its folder; a damaged one in its place is thrown away.

        Raises `MissingHardware` on a full disk; nothing half-made is seen.
        """
        folder = self._place(stage, key)
        self._new.add((stage, key))

        def fill(temporary: Path) -> dict[str, str]:
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

        with disk_errors(folder):
            _add(folder, fill)
        return folder

    def make(self, stage: str, key: str, fill: Fill) -> Path:
        """The folder of an entry, found or made by `fill`.

        One process at a time makes an entry: another that wants the same waits, and finds it. What `fill` raises is
        raised, and leaves nothing behind.
        """
        folder = self._place(stage, key)
        with disk_errors(folder), locked(self._root / "locks" / f"{stage}-{key}"):
            if self.find(stage, key) is None:
                _add(folder, fill)
        return folder

    def drop_unused(self, stage: str, *, older_than_s: float) -> int:
        """Remove the entries of a stage of which no file has another hard link, and count them.

        For large entries that bundles share by hard links: one that no bundle holds any more only takes space. The age
        spares what another process has just made, and the rests of a killed one are swept out with it.
        """
        before, dropped = time.time() - older_than_s, 0
        for folder in (self._root / stage).glob("*/*"):
            with contextlib.suppress(OSError):
                old = folder.stat().st_mtime < before
                if old and all(path.stat().st_nlink == 1 for path in folder.iterdir()):
                    _discard(folder)
                    dropped += 1
        return dropped

    def _place(self, stage: str, key: str) -> Path:
        return self._root / stage / key[:2] / key


def _add(folder: Path, fill: Fill) -> None:
    """Fill a folder beside the entry's place, make it last, and rename it there; what fails leaves nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        digests = dict(fill(temporary))
        (temporary / _ENTRY_NAME).write_text(json.dumps(digests), encoding="utf-8")
        for name in (*digests, _ENTRY_NAME):
            fsync_file(temporary / name)
        fsync_folder(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(folder.parent)


def _is_intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _ENTRY_NAME).read_bytes())
        return bool(digests) and all(hash_file(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _publish(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, unless another process was faster: same key, same content."""
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if _is_intact(folder):
                return
            _discard(folder)
        else:
            return


def _discard(folder: Path) -> None:
    """Move a damaged entry aside in one step before it is removed: nobody sees it half gone."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside / "entry")
    shutil.rmtree(aside, ignore_errors=True)
