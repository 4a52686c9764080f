"""Files that ship with sdopt beside its code, found by name, or the user's own by path: settings and prompts."""

from __future__ import annotations

import os
from pathlib import Path

from sdopt.errors import RecipeError
from sdopt.model.quantization import CalibrationSettings
from sdopt.model.suggest import suggest

_PACKAGE = Path(__file__).resolve().parent.parent
# In an installed wheel they lie in the package, in a checkout beside it.
_ROOTS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_GENERAL_PROMPTS = "general"
_OWN_PROMPTS = "prompts.txt"
_LIMIT_BYTES = 1_000_000


def find_config(kind: str, name: str, ending: str) -> Path:
    """The file `configs/<kind>/<name>.<ending>`; a name with a separator or that ending is the path of a user's file.

    Raises `RecipeError` for one that is not there; the names that come near are in its hint.
    """
    if name.endswith(f".{ending}") or any(separator in name for separator in (os.sep, os.altsep) if separator):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"there is no file {path}")
        return path
    folder = next((root / kind for root in _ROOTS if (root / kind).is_dir()), _ROOTS[0] / kind)
    known = sorted(path.stem for path in folder.glob(f"*.{ending}"))
    if name not in known:
        raise RecipeError(
            f"there is no {name!r} in configs/{kind}",
            hint=suggest(name, known, more=f"; a path ends with .{ending}"),
        )
    return folder / f"{name}.{ending}"


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, without blanks around it; empty lines and those that begin with `#` do not count.

    Raises `RecipeError` for a file without a prompt, one that is not text, and one larger than any list of prompts.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise RecipeError(f"{path} is larger than any list of prompts ({_LIMIT_BYTES // 1_000_000} MB)")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the prompts in {path}: {error}") from error
    prompts = tuple(prompt for line in lines if (prompt := line.strip()) and not prompt.startswith("#"))
    if not prompts:
        raise RecipeError(f"no calibration prompts: {path} has none", hint="write one prompt a line")
    return prompts


def find_prompts(settings: CalibrationSettings, source: str) -> tuple[str, ...]:
    """What calibration draws for a checkpoint: what the settings name, else the source's own, else the general."""
    if settings.prompts:
        return read_prompts(find_config("prompts", settings.prompts, "txt"))
    own = Path(source).expanduser() / _OWN_PROMPTS
    return read_prompts(own if own.is_file() else find_config("prompts", _GENERAL_PROMPTS, "txt"))
