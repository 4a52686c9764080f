"""The state of the machine that the manifest's environment record does not hold, as the parent of a run sees it."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import psutil

from sdopt.bench.case.report import Conditions, MachineRecord


@dataclass(frozen=True)
class CpuUse:
    """Seconds of CPU time that all processes have used on this process's cores, and that the bench itself has used.

    `steal_s` is what a host denied this virtual machine; None where the system does not say.
    """

    at_s: float
    busy_s: float
    own_s: float
    steal_s: float | None = None


def read_cpu_use() -> CpuUse:
    """Read the counters now. Children count once they have ended."""
    times = psutil.cpu_times(percpu=True)
    chosen = [times[core] for core in list_own_cores() if core < len(times)]
    busy_s = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in chosen)
    steals = [core.steal for core in chosen if hasattr(core, "steal")]
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_s = sum(use.ru_utime + use.ru_stime for use in uses)
    return CpuUse(time.monotonic(), busy_s, own_s, sum(steals) if steals else None)


def measure_conditions(before: CpuUse) -> Conditions:
    """How many cores others have kept busy since `before`, and how many were stolen: neither parent nor ended children
    are others.
    """
    now = read_cpu_use()
    elapsed_s = max(1e-9, now.at_s - before.at_s)
    others_s = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
    steal_cores = None
    if now.steal_s is not None and before.steal_s is not None:
        steal_cores = round(max(0.0, (now.steal_s - before.steal_s) / elapsed_s), 3)
    return Conditions(neighbours_cores=round(max(0.0, others_s / elapsed_s), 3), steal_cores=steal_cores)


def measure_machine(before: CpuUse) -> MachineRecord:
    """Cores, memory in bytes, and the conditions since `before`."""
    return MachineRecord(
        logical_cores=len(list_own_cores()),
        memory_bytes=int(psutil.virtual_memory().total),
        conditions=measure_conditions(before),
    )


def list_own_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
