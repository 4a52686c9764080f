"""What the machine did while a process was measured, and whether its times can be believed.

`watch_conditions` looks from a thread of the measured process: at the clock, and at what slowed it down. What other
processes took is for the parent to say (`environment.py`), who knows which processes are its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sdopt.bench.case.report import NEIGHBOURS_ALLOWED_CORES, BenchReport, Conditions
from sdopt.bench.measure.process_environment import list_own_cores
from sdopt.machine.device_memory import find_handle, open_nvml

# A virtual machine that is denied its time is as slow as one beside a neighbour.
_STEAL_ALLOWED_CORES = 0.05
# Processors step their clock by 100 MHz, about 3 %, and one step comes and goes with the work. Three are heat, a limit
# of power, or another governor, and cost a picture that computes all the time as much.
_CLOCK_FALL = 0.10
_POLL_S = 0.25
# A mean over fewer polls is more of one stage than of another.
_LEAST_POLLS = 4
_CPU_FOLDER = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")


class Source(Protocol):
    """What can be read of a processor or a GPU; None where the system does not say."""

    def read_mhz(self) -> float | None: ...

    def count_throttles(self) -> int | None:
        """A number that grows with each time that it was slowed down."""
        ...


class CpuSource:
    """This process's cores, from the files of Linux; elsewhere nothing is known."""

    def __init__(self, folder: Path = _CPU_FOLDER, cpuinfo: Path = _CPUINFO) -> None:
        self._folder, self._cpuinfo, self._cores = folder, cpuinfo, list_own_cores()

    def read_mhz(self) -> float | None:
        """Of the fastest core: the busy ones are no slower than the idle ones."""
        clocks_khz = [_read_number(self._cpu(core) / "cpufreq" / "scaling_cur_freq") for core in self._cores]
        known = [khz / 1e3 for khz in clocks_khz if khz is not None]
        if not known:
            known = self._read_cpuinfo()
        return max(known, default=None)

    def count_throttles(self) -> int | None:
        names = ("core_throttle_count", "package_throttle_count")
        counts = [_read_number(self._cpu(core) / "thermal_throttle" / name) for core in self._cores for name in names]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def _cpu(self, core: int) -> Path:
        return self._folder / f"cpu{core}"

    def _read_cpuinfo(self) -> list[float]:
        try:
            text = self._cpuinfo.read_text(encoding="ascii", errors="replace")
        except OSError:
            return []
        return [float(found) for found in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.M)]


class GpuSource:
    """The GPU's multiprocessors, through NVML. A poll that finds it slowed counts once.

    Only heat and the hardware's own brakes count. Most GPUs reach their limit of power in all long work, and say so.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle, self._slowed = nvml, handle, 0
        self._brakes = (
            nvml.nvmlClocksEventReasonSwThermalSlowdown
            | nvml.nvmlClocksEventReasonHwThermalSlowdown
            | nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
        )

    def read_mhz(self) -> float | None:
        try:
            if self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle) & self._brakes:
                self._slowed += 1
            return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))
        except self._nvml.NVMLError:
            return None

    def count_throttles(self) -> int | None:
        try:
            self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except self._nvml.NVMLError:
            return None
        return self._slowed


class ClockWatch:
    """Means of the clock over windows of whole calls: each call does the same work, so they are to be the same."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._polls: list[float] = []
        self._means: list[float] = []
        self._before = source.count_throttles()

    def poll(self) -> None:
        mhz = self._source.read_mhz()
        if mhz is not None:
            with self._lock:
                self._polls.append(mhz)

    def end_call(self) -> None:
        """To be called between calls: closes the window where it has polls enough for a mean."""
        with self._lock:
            if len(self._polls) >= _LEAST_POLLS:
                self._close()

    def describe(self) -> Conditions:
        """Neighbours and steal are the parent's to add, and the steps of the samples' clock its owner's."""
        if not self._polls and not self._means:
            self.poll()
        with self._lock:
            if self._polls and not self._means:
                self._close()
        after = self._source.count_throttles()
        return Conditions(
            clock_mhz=(min(self._means), max(self._means)) if self._means else None,
            throttled=None if after is None or self._before is None else max(0, after - self._before),
        )

    def _close(self) -> None:
        self._means.append(round(sum(self._polls) / len(self._polls), 1))
        self._polls = []


@contextmanager
def watch_conditions(gpu_uuid: str | None) -> Iterator[ClockWatch]:
    """Look every quarter of a second while the body runs: at the GPU where it computes on one, else at the processor.

    More often would take time from what is measured: reading a clock interrupts its core.
    """
    with open_nvml() as nvml:
        handle = None if gpu_uuid is None or nvml is None else find_handle(nvml, gpu_uuid)
        watch, done = ClockWatch(CpuSource() if handle is None else GpuSource(nvml, handle)), threading.Event()

        def look() -> None:
            while not done.wait(_POLL_S):
                watch.poll()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            done.set()
            thread.join()


def list_problems(report: BenchReport) -> tuple[str, ...]:
    """Why the report's times are not to be believed, a phrase for each kind of reason; empty where they are.

    Each process counts, and the whole run. The clock is also held against that of the same candidate's other processes:
    they did the same work.
    """
    conditions = [report.machine.conditions]
    clocks = []
    for candidate in report.candidates:
        own = [process.conditions for process in candidate.processes]
        conditions += own
        clocks.append([mhz for each in own if each.clock_mhz for mhz in each.clock_mhz])
    return _list_problems(conditions, clocks)


def list_condition_problems(conditions: Conditions) -> tuple[str, ...]:
    """The same for one process, or one run."""
    return _list_problems([conditions], [list(conditions.clock_mhz or ())])


def _list_problems(conditions: list[Conditions], clocks: Iterable[list[float]]) -> tuple[str, ...]:
    problems = []
    if (cores := max(each.neighbours_cores for each in conditions)) > NEIGHBOURS_ALLOWED_CORES:
        problems.append(f"other programs kept {cores:.2f} cores busy")
    if (stolen := max(each.steal_cores or 0.0 for each in conditions)) > _STEAL_ALLOWED_CORES:
        problems.append(f"the virtual machine was denied {stolen:.2f} cores by its host")
    if throttled := max(each.throttled or 0 for each in conditions):
        problems.append(f"heat or a brake of its power slowed the machine down {throttled} times")
    falls = [(min(mhz), max(mhz)) for mhz in clocks if mhz]
    worst = min(falls, key=lambda pair: pair[0] / pair[1], default=None)
    if worst is not None and worst[0] < (1 - _CLOCK_FALL) * worst[1]:
        problems.append(f"the clock changed from {worst[1]:,.0f} to {worst[0]:,.0f} MHz")
    if steps := sum(each.clock_steps for each in conditions):
        problems.append(f"the clock of the samples went back {steps} times, and those samples were dropped")
    return tuple(problems)


def _read_number(path: Path) -> int | None:
    """The file's number; None where there is no such file, or where it may not be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
