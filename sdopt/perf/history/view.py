"""What is shown of a history: for each run its record without samples, for each series a point a run.

`view_history` makes it from whole records, and `sdopt.perf.history.index` keeps the same ready in a database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from sdopt.bench.page.summary import format_bytes, format_ns
from sdopt.perf.history.fingerprint import describe_change
from sdopt.perf.history.history import DamagedLine, HistoryContents
from sdopt.perf.history.nights import take_value
from sdopt.perf.history.record import Metric, MetricKind, RunRecord, SeriesKey, SeriesRecord


@dataclass(frozen=True)
class Point:
    """A series in one run, in the metric's unit. `run` is the run's place in `HistoryView.runs`.

    `low` and `high` are the least and the greatest median of a process; of fidelity, the worst and the best picture.
    """

    run: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HistoryView:
    """`runs` have no series; they are in the order of nights, as the points of every series are."""

    runs: tuple[RunRecord, ...] = ()
    points: Mapping[SeriesKey, tuple[Point, ...]] = field(default_factory=dict)
    damaged: tuple[DamagedLine, ...] = ()

    def split(self, key: SeriesKey) -> tuple[tuple[Point, ...], ...]:
        """The points of a series in the parts that may be compared: of one environment and one suite each.

        Runs of two machines in one history are two parts, however they alternate.
        """
        parts: dict[tuple[str, str], list[Point]] = {}
        for point in self.points.get(key, ()):
            parts.setdefault(_place_of(self.runs[point.run]), []).append(point)
        return tuple(map(tuple, parts.values()))


def view_history(contents: HistoryContents) -> HistoryView:
    points: dict[SeriesKey, list[Point]] = {}
    for place, record in enumerate(contents.records):
        for key, point in list_points(record, place):
            points.setdefault(key, []).append(point)
    runs = tuple(map(without_samples, contents.records))
    return HistoryView(runs, {key: tuple(each) for key, each in points.items()}, contents.damaged)


def without_samples(record: RunRecord) -> RunRecord:
    return record.model_copy(update={"series": ()})


def list_points(record: RunRecord, place: int) -> list[tuple[SeriesKey, Point]]:
    """A point for each series that has a value (`take_value`)."""
    points = ((series.key, _make_point(series, place)) for series in record.series)
    return [(key, point) for key, point in points if point is not None]


def series_of(records: Sequence[RunRecord], fingerprint: str, key: SeriesKey) -> tuple[Point, ...]:
    """The points of one series in one environment; `run` is the place among all `records`."""
    placed = ((place, record.find(key)) for place, record in enumerate(records) if record.fingerprint == fingerprint)
    points = (_make_point(series, place) for place, series in placed if series is not None)
    return tuple(point for point in points if point is not None)


def describe_breaks(runs: Sequence[RunRecord]) -> dict[int, str]:
    """By place of the first run in another environment or suite, what changed since the run before it."""
    breaks = {}
    known = {_place_of(run) for run in runs[:1]}
    for place, (before, after) in enumerate(pairwise(runs), 1):
        if _place_of(after) in known:
            continue
        known.add(_place_of(after))
        changes = describe_change(before, after)
        if before.suite_digest != after.suite_digest:
            renamed = f"suite {before.suite} -> {after.suite}"
            changes = (*changes, "the suite was edited" if before.suite == after.suite else renamed)
        breaks[place] = ", ".join(changes)
    return breaks


def format_value(metric: Metric, value: float) -> str:
    """With its unit."""
    match metric.kind:
        case MetricKind.MEMORY | MetricKind.SIZE:
            return format_bytes(value)
        case MetricKind.PSNR:
            return "equal" if math.isinf(value) else f"{value:.2f} dB"
        case MetricKind.SSIM:
            return f"{value:.4f}"
        case _:
            return format_ns(value)


def _place_of(run: RunRecord) -> tuple[str, str]:
    return run.fingerprint, run.suite_digest


def _make_point(series: SeriesRecord, place: int) -> Point | None:
    value = take_value(series)
    if value is None:
        return None
    groups = [group for group in series.groups if group]
    spread = [median(group) for group in groups] if len(groups) > 1 else list(groups[0])
    return Point(place, value, min(value, *spread), max(value, *spread)) if spread else None
