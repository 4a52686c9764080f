"""A bundle's pipeline for tests: open, quiet, and closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sdopt
from sdopt.pipeline.load import close_engines


@contextmanager
def opened_pipeline(folder: Path) -> Iterator[Any]:
    pipe: Any = sdopt.load(folder)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield pipe
    finally:
        close_engines(pipe)
