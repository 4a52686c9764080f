"""A history as one self-contained HTML page, as CSV, and as lines for a terminal: nights, series, what changed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from statistics import median

from sdopt.bench.page.csv_export import quote_formula
from sdopt.disk.files import disk_errors, write_file
from sdopt.errors import MissingDependency
from sdopt.perf.history.nights import NIGHTS, relative_change
from sdopt.perf.history.record import Metric, MetricKind, RunRecord, SeriesKey
from sdopt.perf.history.view import HistoryView, Point, describe_breaks, format_value

PAGE_NAME, CSV_NAME = "index.html", "history.csv"
COLUMNS = (
    "run", "created_utc", "kind", "suite", "commit", "changed", "fingerprint", "verdict", "dirty", "case", "candidate",
    "metric", "value", "low", "high",
)  # fmt: skip
# A year and a month: more would make the page too large to send, and all is in the CSV.
_MOST_NIGHTS = 400
_MOST_PLOTS = 120
_MOST_ROWS = 100
_LINES = 30


@dataclass(frozen=True)
class Break:
    """A new environment or suite, which the plots mark with the letter."""

    letter: str
    run: RunRecord
    change: str


@dataclass(frozen=True)
class SeriesRow:
    """The last point of a series, beside the median of up to 14 before it in the same environment and suite."""

    key: SeriesKey
    last: str
    usual: str
    change: str
    count: int
    is_old: bool
    """Whether the last run lacks it."""


def write_history_page(folder: Path, view: HistoryView) -> tuple[Path, Path]:
    """Write the page and the CSV into a folder, which is made if need be, and return their paths.

    Raises `MissingDependency` (extra `report`) without Jinja2 or matplotlib.
    """
    page = render_history(view)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / PAGE_NAME, page.encode())
    write_file(folder / CSV_NAME, format_csv(view).encode())
    return folder / PAGE_NAME, folder / CSV_NAME


def render_history(view: HistoryView) -> str:
    """The page: no script, nothing from elsewhere, everything escaped."""
    try:
        import jinja2

        from sdopt.perf.page.history_plots import plot_series
    except ImportError as error:
        raise MissingDependency.of("jinja2", extra="report") from error
    folders = (files("sdopt.perf.page").joinpath("templates"), files("sdopt.bench.page").joinpath("templates"))

    def load(name: str) -> str | None:
        found = (folder.joinpath(name) for folder in folders)
        return next((path.read_text("utf-8") for path in found if path.is_file()), None)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["shorten"] = _shorten
    breaks = list_breaks(view)
    first = max(0, len(view.runs) - _MOST_NIGHTS)
    letters = {place: found.letter for place, found in breaks.items()}
    keys = _sort_keys(view)
    drawn = [(key, plot) for key in keys[:_MOST_PLOTS] if (plot := plot_series(view, key, first, letters))]
    return environment.get_template("history.html.j2").render(
        summary=describe_history(view),
        suites=", ".join(dict.fromkeys(run.suite for run in view.runs)),
        runs=[(run, breaks.get(place)) for place, run in reversed(list(enumerate(view.runs)))][:_MOST_ROWS],
        runs_left_out=max(0, len(view.runs) - _MOST_ROWS),
        breaks=list(breaks.values()),
        series=[make_row(view, key) for key in keys],
        plots=[(case, [plot for _, plot in group]) for case, group in groupby(drawn, key=lambda each: each[0].case)],
        plots_left_out=max(0, len(keys) - _MOST_PLOTS),
        nights_left_out=first,
        usual_nights=NIGHTS,
        damaged=view.damaged,
    )


def describe_history(view: HistoryView) -> str:
    """The history in a sentence or two."""
    if not view.runs:
        return "The history has no run yet."
    last, runs = view.runs[-1], _count(len(view.runs), "run")
    if len(view.runs) > 1:
        runs += f" from {view.runs[0].created_utc[:10]} to {last.created_utc[:10]}"
    environments = _count(len({run.fingerprint for run in view.runs}), "environment")
    alarms, dirty = (sum(run.verdict == "alarm" for run in view.runs), sum(bool(run.dirty) for run in view.runs))
    said = {"pass": "passed", "alarm": "alarmed", "": "is without a verdict"}[last.verdict]
    return (
        f"The last run {said}. {runs} of {len(view.points)} series in {environments}: {alarms} alarmed, "
        f"{dirty} {'was' if dirty == 1 else 'were'} dirty."
    )


def _count(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def format_history(view: HistoryView) -> str:
    """For a terminal: the last 30 runs, and each series' last point; lines end with a newline."""
    lines = [describe_history(view)]
    breaks = list_breaks(view)
    lines += [f"line {damage.line_number} is not a run: {damage.reason}" for damage in view.damaged]
    for place, run in list(enumerate(view.runs))[-_LINES:]:
        if place in breaks:
            lines.append(f"  -- {breaks[place].change}")
        notes = ", ".join(filter(None, (*run.dirty, "uncommitted changes" if run.changed else "")))
        parts = (run.id, run.kind.value.ljust(7), (run.commit or "-")[:12].ljust(12), (run.verdict or "-").ljust(5))
        lines.append(f"{'  '.join(parts)}  {notes}".rstrip())
    rows = [("series", "last", "usual", "change")]
    rows += [(str(row.key), row.last, row.usual, row.change) for row in (make_row(view, k) for k in _sort_keys(view))]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines.append("")
    for name, *cells in rows if len(rows) > 1 else ():
        columns = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {'  '.join(columns)}".rstrip())
    return "\n".join(lines).rstrip("\n") + "\n"


def format_csv(view: HistoryView) -> str:
    """A row for each point, in ns, bytes and dB, by series and night."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for key in _sort_keys(view):
        for point in view.points[key]:
            cells = _list_cells(view.runs[point.run], key, point)
            writer.writerow([quote_formula(cell) if isinstance(cell, str) else cell for cell in cells])
    return buffer.getvalue()


def list_breaks(view: HistoryView) -> dict[int, Break]:
    """By place of the first run in a new environment or suite."""
    found = describe_breaks(view.runs)
    return {
        place: Break(_name_letter(index), view.runs[place], change)
        for index, (place, change) in enumerate(found.items())
    }


def make_row(view: HistoryView, key: SeriesKey) -> SeriesRow:
    points = view.points[key]
    part = next(part for part in view.split(key) if part[-1] == points[-1])
    last, before = part[-1].value, [point.value for point in part[-1 - NIGHTS : -1]]
    usual = median(before) if before else None
    return SeriesRow(
        key, format_value(key.metric, last), "" if usual is None else format_value(key.metric, usual),
        "" if usual is None else _describe_move(key, usual, last), len(points), points[-1].run < len(view.runs) - 1,
    )  # fmt: skip


def _describe_move(key: SeriesKey, usual: float, last: float) -> str:
    match key.metric.kind:
        case MetricKind.PSNR | MetricKind.SSIM:
            moved = 0.0 if usual == last else last - usual
            return f"{moved:+.2f}" if key.metric.kind is MetricKind.PSNR else f"{moved:+.4f}"
        case _:
            return f"{relative_change(usual, last):+.1%}"


def _list_cells(run: RunRecord, key: SeriesKey, point: Point) -> Iterator[object]:
    yield from (run.id, run.created_utc, run.kind.value, run.suite, run.commit, run.changed, run.fingerprint)
    yield from (run.verdict, "; ".join(run.dirty), key.case, key.candidate, key.metric.value)
    yield from (point.value, point.low, point.high)


def _sort_keys(view: HistoryView) -> list[SeriesKey]:
    metrics = list(Metric)
    return sorted(view.points, key=lambda key: (key.case, key.candidate, metrics.index(key.metric)))


def _name_letter(index: int) -> str:
    """a to z, then aa, ab and on."""
    letters = ""
    while index >= 0:
        index, letter = divmod(index, 26)
        letters, index = chr(ord("a") + letter) + letters, index - 1
    return letters


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
