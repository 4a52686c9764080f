"""Where derived inputs are kept: converted pickles and tokenizer folders. Losing it costs time, nothing
else."""

from __future__ import annotations

import os
from pathlib import Path

from sdopt.artifacts.files import disk_errors


def open_cache_folder(kind: str) -> Path:
    """A folder of the cache, made where it is absent: under `SDOPT_CACHE`, else `~/.cache/sdopt`."""
    root = Path(os.environ.get("SDOPT_CACHE") or Path.home() / ".cache" / "sdopt").expanduser().absolute()
    folder = root / kind
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
