"""Locks between processes. The kernel holds them: a process that ends or is killed leaves none."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdopt import progress


@contextmanager
def locked(path: Path, *, waiting: str = "") -> Iterator[None]:
    """Hold the lock whose file is `path`, which is made with its folders; `waiting` is shown while another holds it.

    The file stays: to remove one that another process waits for would give two of them the lock. Raises `OSError` where
    it cannot be made.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting:
            progress.update(waiting, 0.0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_open_file(descriptor: int, *, shared: bool = False) -> None:
    """Wait for the lock of an open file itself, until it is closed; any number of readers may share it.

    Not filelock's: its older versions empty the file that they lock, and its lock for readers is a database to write.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
