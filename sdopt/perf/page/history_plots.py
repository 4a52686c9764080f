"""A series over the nights as inline SVG: a line for each environment, and marks for what a reader has to know of a
night.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from sdopt.bench.page.plots import ENGINES_COLOUR, GAP, LINE, SERIES, TEXT, WIDTH_IN, Plot, style_axes, to_plot
from sdopt.perf.history.record import MetricKind, RunKind, RunRecord, SeriesKey
from sdopt.perf.history.view import HistoryView, Point, format_value

_HEIGHT_IN = 1.9
_ALARM_COLOUR = SERIES[6]
_MOST_TICKS = 4
# Noise of half a per cent is not to look like a mountain.
_LEAST_RANGE = 0.03
# A mark for each night of a year has room; of more, only the line and what is special is drawn.
_MOST_MARKS = 200


def plot_series(view: HistoryView, key: SeriesKey, first: int, breaks: Mapping[int, str]) -> Plot | None:
    """The nights from the run at place `first` on. `breaks` has the letter of each new environment by its first run.

    None where no night has a number to draw, as where all pictures are equal.
    """
    parts = [[p for p in part if p.run >= first and math.isfinite(p.value)] for part in view.split(key)]
    points = sorted((point for part in parts for point in part), key=lambda point: point.run)
    if not points:
        return None
    unit, size = _choose_unit(key, points)
    figure = Figure(figsize=(WIDTH_IN, _HEIGHT_IN))
    axes = figure.add_axes((0.13, 0.2, 0.84, 0.7))
    for part in parts:
        places, values = [point.run for point in part], [point.value / size for point in part]
        axes.vlines(places, [p.low / size for p in part], [p.high / size for p in part], color=LINE, linewidth=2.2)
        axes.plot(places, values, color=ENGINES_COLOUR, linewidth=1.2)
    _draw_marks(axes, view.runs, points, size)
    _draw_breaks(axes, {place: letter for place, letter in breaks.items() if place >= first})
    _set_range(axes, points, size, first, len(view.runs))
    style_axes(axes, "")
    axes.set_ylabel(unit, fontsize=10.5, color=TEXT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    _label_nights(axes, view.runs, first)
    last = f"{format_value(key.metric, points[-1].value)} in the run of {view.runs[points[-1].run].created_utc[:10]}"
    name = f"{key.candidate}, {key.metric.replace('_', ' ')}"
    return to_plot(figure, f"s{list(view.points).index(key)}", f"{name}: {last}")


def _draw_marks(axes: Any, runs: Sequence[RunRecord], points: Sequence[Point], size: float) -> None:
    for point in points:
        run = runs[point.run]
        special = bool(run.dirty) or run.verdict == "alarm" or run.kind is RunKind.BRIDGE
        if not special and len(points) > _MOST_MARKS:
            continue
        alarmed = run.verdict == "alarm"
        colour = _ALARM_COLOUR if alarmed else ENGINES_COLOUR
        axes.plot(
            [point.run], [point.value / size], linestyle="none", markeredgewidth=1.2, markeredgecolor=colour,
            marker="^" if alarmed else "s" if run.kind is RunKind.BRIDGE else "o",
            markersize=6.5 if alarmed else 5.5 if special else 3, markerfacecolor=GAP if run.dirty else colour,
        )  # fmt: skip


def _draw_breaks(axes: Any, breaks: Mapping[int, str]) -> None:
    for place, letter in breaks.items():
        axes.axvline(place - 0.5, color=TEXT, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.text(place - 0.5, 1.02, letter, transform=axes.get_xaxis_transform(), ha="center", fontsize=10, color=TEXT)


def _set_range(axes: Any, points: Sequence[Point], size: float, first: int, count: int) -> None:
    middle = median(point.value for point in points) / size
    ends = [point.low / size for point in points] + [point.high / size for point in points]
    ends = [end for end in ends if math.isfinite(end)]
    room = _LEAST_RANGE * abs(middle) or 1.0
    low, high = min(*ends, middle - room), max(*ends, middle + room)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_xlim(first - 0.7, count - 0.3)


def _label_nights(axes: Any, runs: Sequence[RunRecord], first: int) -> None:
    step = max(1, math.ceil((len(runs) - first) / _MOST_TICKS))
    places = range(first, len(runs), step)
    axes.set_xticks(list(places), [runs[place].created_utc[:10] for place in places], fontsize=10)
    axes.locator_params(axis="y", nbins=4, prune="lower")
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")


def _choose_unit(key: SeriesKey, points: Sequence[Point]) -> tuple[str, float]:
    largest = max(point.value for point in points)
    match key.metric.kind:
        case MetricKind.MEMORY | MetricKind.SIZE:
            steps = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        case MetricKind.PSNR:
            return "dB", 1.0
        case MetricKind.SSIM:
            return "SSIM", 1.0
        case _:
            steps = (("s", 1e9), ("ms", 1e6), ("µs", 1e3))
    return next((step for step in steps if largest >= step[1]), steps[-1])
