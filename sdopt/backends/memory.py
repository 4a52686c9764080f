"""Resident memory of this process, for `Session.memory`."""

from __future__ import annotations

from pathlib import Path

import psutil

from sdopt.backends.protocol import MemoryUse
from sdopt.isolation import peak_rss_bytes


def measure_memory(weights: Path) -> MemoryUse:
    return MemoryUse(weights.stat().st_size, psutil.Process().memory_info().rss, peak_rss_bytes())
