"""The state of the machine that the manifest's environment record does not hold."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import psutil

from sdopt.bench.report import Conditions, MachineRecord


@dataclass(frozen=True)
class CpuUse:
    """Seconds of CPU time that all processes have used on this process's cores, and that the bench itself has used."""

    at_s: float
    busy_s: float
    own_s: float


def read_cpu_use() -> CpuUse:
    """Read the counters now. Children count once they have ended."""
    times = psutil.cpu_times(percpu=True)
    chosen = [times[core] for core in _own_cores() if core < len(times)]
    busy_s = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in chosen)
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return CpuUse(time.monotonic(), busy_s, sum(use.ru_utime + use.ru_stime for use in uses))


def measure_machine(before: CpuUse) -> MachineRecord:
    """Cores, memory in bytes, and how many cores others have kept busy since `before`."""
    now = read_cpu_use()
    others_s = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
    return MachineRecord(
        logical_cores=len(_own_cores()),
        memory_bytes=int(psutil.virtual_memory().total),
        conditions=Conditions(neighbours_cores=round(max(0.0, others_s / max(1e-9, now.at_s - before.at_s)), 3)),
    )


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
