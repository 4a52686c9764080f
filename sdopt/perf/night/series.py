"""A bench report -> series of the history, and the failures in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from sdopt.bench.case.candidates import ENGINES
from sdopt.bench.case.report import BenchReport, CandidateRecord, Conditions, ProcessRecord, Stage, Status
from sdopt.perf.history.record import FailureRecord, Metric, SeriesKey, SeriesRecord

Groups = tuple[tuple[float, ...], ...]

_BY_PROCESS: dict[Metric, Callable[[ProcessRecord], int | None]] = {
    Metric.COLD_START: lambda process: process.cold_start_ns,
    Metric.LOAD: lambda process: process.load_ns,
    Metric.PEAK_MEMORY: lambda process: process.peak_rss_bytes,
    Metric.DEVICE_MEMORY: lambda process: process.peak_device_bytes,
}


def list_series(case: str, report: BenchReport, build_ns: int | None) -> list[SeriesRecord]:
    """Every candidate that was measured by every metric that it has samples of.

    `build_ns` is the time of the engines' build; None where something of it was found in a store.
    """
    found: list[SeriesRecord] = []
    for candidate in report.candidates:
        if candidate.status is not Status.OK:
            continue
        groups = dict(group_samples(candidate.processes))
        groups |= dict(_group_fidelity(candidate))
        if candidate.name == ENGINES:
            groups[Metric.BUNDLE_SIZE] = ((float(report.case.bundle_bytes),),)
            if build_ns is not None:
                groups[Metric.BUILD] = ((float(build_ns),),)
        found += [
            SeriesRecord(key=SeriesKey(case=case, candidate=candidate.name, metric=metric), groups=groups[metric])
            for metric in Metric
            if metric in groups
        ]
    return found


def group_samples(processes: Sequence[ProcessRecord]) -> Iterator[tuple[Metric, Groups]]:
    """Metrics of processes, a group for each; in ns and bytes. What no process has is left out."""
    for stage in Stage:
        groups = tuple(tuple(map(float, process.samples_ns.get(stage, ()))) for process in processes)
        if any(groups):
            yield Metric(stage.value), tuple(group for group in groups if group)
    for metric, read in _BY_PROCESS.items():
        values = [value for process in processes if (value := read(process)) is not None]
        if values:
            yield metric, tuple((float(value),) for value in values)


def _group_fidelity(candidate: CandidateRecord) -> Iterator[tuple[Metric, Groups]]:
    """One group, a sample for each picture. Equal pictures have an infinite PSNR."""
    pictures = candidate.fidelity
    if pictures:
        yield Metric.PSNR, (tuple(float("inf") if each.psnr_db is None else each.psnr_db for each in pictures),)
        yield Metric.SSIM, (tuple(each.ssim for each in pictures),)


def list_failures(case: str, report: BenchReport) -> list[FailureRecord]:
    """Candidates that failed. One that lacks something of this machine did not: it is missing, if it ever was there."""
    return [
        FailureRecord(case=case, candidate=candidate.name, message=candidate.message)
        for candidate in report.candidates
        if candidate.status is Status.FAILED
    ]


def merge_conditions(conditions: Iterable[Conditions]) -> Conditions:
    """The worst of several: what is unknown in all stays unknown."""
    each = list(conditions)
    clocks = [mhz for one in each if one.clock_mhz is not None for mhz in one.clock_mhz]
    return Conditions(
        neighbours_cores=max((one.neighbours_cores for one in each), default=0.0),
        clock_mhz=(min(clocks), max(clocks)) if clocks else None,
        throttled=_add(one.throttled for one in each),
        steal_cores=max((one.steal_cores for one in each if one.steal_cores is not None), default=None),
        clock_steps=sum(one.clock_steps for one in each),
    )


def _add(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
