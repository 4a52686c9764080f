"""What makes a run dirty, and the files and the library that it is read from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.bench.case.report import BenchReport, Conditions
from sdopt.bench.measure import conditions as conditions_module
from sdopt.bench.measure import process_environment as environment
from sdopt.bench.measure.conditions import (
    ClockWatch,
    CpuSource,
    GpuSource,
    list_condition_problems,
    list_problems,
    watch_conditions,
)
from sdopt.bench.measure.process_environment import CpuUse, measure_conditions
from tests.nvml_double import FakeNvml
from tests.planted_reports import make_report


def test_a_quiet_run_has_no_problems() -> None:
    quiet = Conditions(neighbours_cores=0.05, clock_mhz=(2700, 3000), throttled=0, steal_cores=0.05)
    assert list_condition_problems(quiet) == ()
    assert list_condition_problems(Conditions()) == ()


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (Conditions(neighbours_cores=0.06), "0.06 cores busy"),
        (Conditions(steal_cores=0.2), "denied 0.20 cores"),
        (Conditions(throttled=3), "3 times"),
        (Conditions(clock_mhz=(2600, 3000)), "from 3,000 to 2,600 MHz"),
        (Conditions(clock_steps=2), "went back 2 times"),
    ],
)
def test_each_problem_is_named(conditions: Conditions, words: str) -> None:
    (problem,) = list_condition_problems(conditions)
    assert words in problem


def plant(report: BenchReport, index: int, *conditions: Conditions) -> BenchReport:
    """The report with the conditions of a candidate's processes."""
    candidate = report.candidates[index]
    processes = tuple(
        process.model_copy(update={"conditions": each})
        for process, each in zip(candidate.processes, conditions, strict=True)
    )
    candidates = list(report.candidates)
    candidates[index] = candidate.model_copy(update={"processes": processes})
    return report.model_copy(update={"candidates": tuple(candidates)})


def test_one_bad_process_makes_the_report_dirty() -> None:
    report = make_report()
    assert list_problems(report) == ()
    (problem,) = list_problems(plant(report, 1, Conditions(), Conditions(neighbours_cores=0.9)))
    assert "0.90" in problem


def test_the_clock_is_compared_within_a_candidate_alone() -> None:
    """Each computes in its own way, and wide registers lower the clock; the same work does not."""
    report = plant(make_report(), 0, *[Conditions(clock_mhz=(2500, 2500))] * 2)
    assert list_problems(plant(report, 1, *[Conditions(clock_mhz=(3500, 3500))] * 2)) == ()
    slower = plant(report, 1, Conditions(clock_mhz=(3500, 3500)), Conditions(clock_mhz=(3000, 3050)))
    assert list_problems(slower) == ("the clock changed from 3,500 to 3,000 MHz",)


class PlantedSource:
    """A clock that shows these values, and a counter that grows by one with each look at it."""

    def __init__(self, clocks: list[float | None], counts: list[int | None]) -> None:
        self._clocks, self._counts = iter(clocks), iter(counts)

    def read_mhz(self) -> float | None:
        return next(self._clocks)

    def count_throttles(self) -> int | None:
        return next(self._counts)


def test_the_clock_is_a_mean_over_whole_calls() -> None:
    watch = ClockWatch(PlantedSource([3000.0, 2000.0] * 4 + [1000.0], [4, 6]))
    for _ in range(2):
        for _ in range(4):
            watch.poll()
        watch.end_call()
    watch.poll()  # too little of a call for a mean
    conditions = watch.describe()
    assert conditions.clock_mhz == (2500, 2500)
    assert conditions.throttled == 2


def test_a_short_process_is_looked_at_once_and_null_is_null() -> None:
    assert ClockWatch(PlantedSource([2600.0], [None, None])).describe() == Conditions(clock_mhz=(2600, 2600))
    assert ClockWatch(PlantedSource([None], [0, 0])).describe() == Conditions(throttled=0)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_clock_and_throttling_are_read_from_the_own_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions_module, "list_own_cores", lambda: [0, 2])
    for core, khz in enumerate((2_400_000, 9_900_000, 3_100_000)):
        write(tmp_path / f"cpu{core}" / "cpufreq" / "scaling_cur_freq", f"{khz}\n")
        write(tmp_path / f"cpu{core}" / "thermal_throttle" / "core_throttle_count", f"{core + 1}\n")
    source = CpuSource(tmp_path)
    assert source.read_mhz() == 3100
    assert source.count_throttles() == 4


def test_without_cpufreq_the_clock_is_that_of_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu MHz\t\t: 2593.906\nprocessor\t: 1\ncpu MHz\t\t: 2600.000\n")
    assert CpuSource(tmp_path, cpuinfo).read_mhz() == 2600
    nothing = CpuSource(tmp_path, tmp_path / "absent")
    assert (nothing.read_mhz(), nothing.count_throttles()) == (None, None)


def test_heat_of_a_gpu_counts_and_its_usual_limit_of_power_does_not() -> None:
    nvml = FakeNvml(reasons=FakeNvml.nvmlClocksEventReasonSwPowerCap)
    watch = ClockWatch(GpuSource(nvml, "GPU-abc"))
    watch.poll()
    assert watch.describe() == Conditions(clock_mhz=(1980, 1980), throttled=0)
    nvml.reasons = FakeNvml.nvmlClocksEventReasonHwThermalSlowdown
    watch.poll()
    assert watch.describe().throttled == 1


def test_a_gpu_is_watched_through_nvml_where_it_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(mhz=1234))  # type: ignore[arg-type]
    monkeypatch.setattr(CpuSource, "read_mhz", lambda self: 77.0)
    with watch_conditions("abc") as of_gpu, watch_conditions("other") as of_cpu, watch_conditions(None) as cpu:
        assert of_gpu.describe().clock_mhz == (1234, 1234)
        assert of_cpu.describe().clock_mhz == cpu.describe().clock_mhz == (77, 77)


def test_neighbours_and_steal_are_what_the_bench_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "read_cpu_use", lambda: CpuUse(110.0, 250.0, 80.0, 7.0))
    assert measure_conditions(CpuUse(100.0, 230.0, 65.0, 6.0)) == Conditions(neighbours_cores=0.5, steal_cores=0.1)
    assert measure_conditions(CpuUse(100.0, 230.0, 55.0)) == Conditions(neighbours_cores=0.0, steal_cores=None)


def test_the_counters_are_those_of_the_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [SimpleNamespace(user=1.0, system=2.0, nice=3.0, steal=0.5, guest=1.0), SimpleNamespace(user=9, system=9)]
    monkeypatch.setattr(environment.psutil, "cpu_times", lambda percpu: times)
    monkeypatch.setattr(environment, "list_own_cores", lambda: [0])
    use: Any = environment.read_cpu_use()
    assert (use.busy_s, use.steal_s) == (6.0, 0.5)
