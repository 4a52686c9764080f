"""The checkpoint of a suite's case: the shipped one, full-size random networks that are made once, or a path."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import sdopt
from sdopt import progress
from sdopt.disk.files import disk_errors
from sdopt.disk.locks import locked
from sdopt.disk.store import cache_root
from sdopt.errors import UsageError
from sdopt.model.suggest import suggest
from sdopt.processes.call import How, call_by_name

SHIPPED = "tiny-shapes"
_RANDOM = "random:"
_FAMILIES = ("sd15", "sdxl")
_SEED = 0


def find_source(name: str) -> Path:
    """The folder or file that a case's `source` names, as an absolute path; random networks are made where they are
    not in the cache (2 GB and half a minute for `sd15`).

    Raises `UsageError` for an unknown name and a path that is not there, `MissingHardware` on a full disk.
    """
    if name == SHIPPED:
        return Path(sdopt.__file__).resolve().parent / "assets" / SHIPPED
    if name.startswith(_RANDOM):
        return _find_random(name.removeprefix(_RANDOM))
    path = Path(name).expanduser().absolute()
    if not name or not path.exists():
        known = ", ".join([SHIPPED, *(_RANDOM + family for family in _FAMILIES)])
        raise UsageError(f"there is no checkpoint {name!r}", hint=f"a path that exists, or one of: {known}")
    return path


def _find_random(family: str) -> Path:
    if family not in _FAMILIES:
        raise UsageError(f"there are no random networks of {family!r}", hint=suggest(family, _FAMILIES))
    folder = cache_root() / "random" / f"{family}-{_SEED}"
    with disk_errors(folder), locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _make_random(family, folder)
    return folder


def _make_random(family: str, folder: Path) -> None:
    progress.update(f"making random networks of {family}, once", 0.0)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        arguments = {"family": family, "folder": str(made), "seed": _SEED}
        call_by_name("sdopt.bench.case.random_checkpoint:make_in_child", arguments, how=How.FRESH)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
