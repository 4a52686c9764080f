"""The command that builds a bundle again, as a hint: `sdopt convert --again` reads the recipe out of the bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

from sdopt.model.precision import Precision
from sdopt.model.target import Target


def again_command(
    folder: Path, *, output: Path | None = None, target: Target | None = None, precision: Precision | None = None
) -> str:
    """The command line that makes the bundle at `folder` again, in its place or at `output`.

    `target` and `precision` are what is to differ; a precision also takes the place of the recipe's quantisation.
    """
    words = ["sdopt", "convert", "--again", str(folder)]
    for flag, value in (("-o", output), ("--target", target), ("--precision", precision)):
        if value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def variant_command(flags: str, folder: Path | None = None) -> str:
    """The command line that builds a bundle's recipe with other `flags`, beside it.

    Where nobody knows the bundle's folder, the command says FOLDER, and OTHER for the new one.
    """
    given, other = ("FOLDER", "OTHER") if folder is None else (str(folder), str(beside(folder, "other")))
    return f"sdopt convert --again {shlex.quote(given)} {flags} -o {shlex.quote(other)}"


def beside(folder: Path, ending: str) -> Path:
    """A folder beside the bundle, for another build of it: `engines/mine-cpu` for `engines/mine`."""
    named = folder if folder.name.strip(".") else folder.resolve()
    return named.with_name(f"{named.name}-{ending}")
