"""Where derived inputs are kept: converted pickles and tokenizer folders. Losing it costs time, nothing
else."""

from __future__ import annotations

from pathlib import Path

from sdopt.disk.files import disk_errors
from sdopt.disk.store import cache_root


def open_cache_folder(kind: str) -> Path:
    """A folder of the cache, made where it is absent."""
    folder = cache_root() / kind
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
