"""The state of the machine that the manifest's environment record does not hold."""

from __future__ import annotations

import os

import psutil

from sdopt.bench.report import MachineRecord


def measure_machine() -> MachineRecord:
    """Cores, memory in bytes, and how busy the machine was in the minute before."""
    return MachineRecord(
        logical_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        load_average=round(psutil.getloadavg()[0], 2),
    )
