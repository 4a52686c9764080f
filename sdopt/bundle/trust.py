"""Which plans this user trusts. A plan holds compiled code that runs in the process which opens it, unlike a graph.

NVIDIA says the same of its engine files: to open one from elsewhere is to run a program from elsewhere. So plans are
opened only when this user built them on this machine, or named their digest: one plan's, or that of a `bundle.json`,
which names all of the bundle's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from sdopt.bundle.manifest import BundleManifest
from sdopt.disk.files import disk_errors, hash_file, write_file
from sdopt.disk.store import cache_root
from sdopt.errors import UsageError
from sdopt.model.file_names import MANIFEST_NAME

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def remember_built(sha256: str) -> None:
    """Trust the plan of this digest from now on, on this machine and for this user."""
    path = _place(parse_digest(sha256))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(path, sha256.encode())


def list_untrusted(folder: Path, manifest: BundleManifest, trust_engines: Iterable[str] = ()) -> tuple[str, ...]:
    """The plan files of a bundle that are neither remembered nor named by `trust_engines`, by their paths in it.

    Answers from the manifest: that each file has the digest it says is for `find_damage` to see. Raises `UsageError`
    for a word in `trust_engines` that is not a SHA-256.
    """
    named = {parse_digest(word) for word in trust_engines}
    if named and hash_file(folder / MANIFEST_NAME) in named:
        return ()
    return tuple(
        file for file, sha256 in _list_plans(manifest).items() if sha256 not in named and not _is_remembered(sha256)
    )


def remember_named(folder: Path, manifest: BundleManifest, trust_engines: Iterable[str]) -> None:
    """Trust from now on those plans of a bundle that `trust_engines` names: one by its own digest, or all by that of
    `bundle.json`.
    """
    named = {parse_digest(word) for word in trust_engines}
    everything = bool(named) and hash_file(folder / MANIFEST_NAME) in named
    for sha256 in _list_plans(manifest).values():
        if everything or sha256 in named:
            remember_built(sha256)


def parse_digest(text: str) -> str:
    """64 hex digits in lower case. Raises `UsageError`."""
    digest = text.strip().lower().removeprefix("sha256:")
    if not _SHA256.match(digest):
        raise UsageError(
            f"{text!r} is not a SHA-256 of 64 hex digits", hint="sdopt check FOLDER says the one to give --trust-engine"
        )
    return digest


def _list_plans(manifest: BundleManifest) -> dict[str, str]:
    files = (plan.file for record in manifest.components.values() for plan in record.every_plan)
    return {file: manifest.files[file].sha256 if file in manifest.files else "" for file in files}


def _place(sha256: str) -> Path:
    return cache_root() / "trusted-engines" / sha256


def _is_remembered(sha256: str) -> bool:
    """A cache may be in a folder that others can write to: only what this user wrote counts."""
    path = _place(sha256)
    try:
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and path.read_text("ascii") == sha256
    except (OSError, ValueError):
        return False
