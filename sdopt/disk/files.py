"""Files that are never half written, and paths that never leave their folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdopt.errors import ArtifactError, MissingHardware, UnsafeInputError

_CHUNK_BYTES = 4 << 20


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def resolve_inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refused unless it is a plain relative POSIX path to a place inside `folder`.

    Links are refused too, at every level: a manifest must not make sdopt read or write elsewhere.
    """
    path = folder
    for part in require_relative(folder, relative).parts:
        path = path / part
        if path.is_symlink():
            raise UnsafeInputError(f"{path} is a symbolic link", hint="replace it with the file that it points to")
    return path


def require_relative(folder: Path, relative: str) -> PurePosixPath:
    """Raise `UnsafeInputError` unless it is a plain relative POSIX path inside `folder`. Links are not looked at."""
    pure = PurePosixPath(relative)
    plain = relative and not pure.is_absolute() and ".." not in pure.parts
    if not plain or any(mark in relative for mark in "\\:\0"):
        raise UnsafeInputError(f"the path {relative!r} is not a relative path inside {folder}")
    return pure


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_folder = fsync_file
"""What makes a rename inside a folder last."""


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename."""
    if not path.parent.is_dir() or path.is_dir():
        where = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise ArtifactError(f"cannot write {path}: {where}")
    with disk_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says into an error that names the file, and for a full disk or a permission what to do.

    `FileExistsError`, `NotADirectoryError` and the errors of libraries that look like the system's stay as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MissingHardware(
                f"the disk is full, or a limit on the size of files is reached, while writing {path}",
                hint="free some space, then run the same command again: finished steps are kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ArtifactError(f"no permission to write {path}", hint="choose another folder with -o") from error
        if isinstance(error, (FileExistsError, NotADirectoryError)) or type(error).__module__ != "builtins":
            raise  # the caller knows what is in the place of what, and what its libraries mean
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


def require_writable(output: Path) -> None:
    """Raise what `disk_errors` raises where nothing can be put beside `output`, before the work rather than after it.

    Permissions alone do not say it, for an administrator or in a folder such as /proc: a file is made and removed.
    """
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    with disk_errors(output), tempfile.NamedTemporaryFile(dir=folder, prefix=".sdopt-"):
        pass


def require_free_disk(folder: Path, needed_bytes: int) -> None:
    """Raise `MissingHardware` before the work, rather than after an hour of it."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise MissingHardware(
            f"{needed_bytes / 1e9:.1f} GB are needed in {folder}, and {free_bytes / 1e9:.1f} GB are free",
            hint="free some space or choose another folder with -o",
        )
