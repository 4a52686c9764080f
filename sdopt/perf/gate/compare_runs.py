"""Two reports of the bench, or two runs of a history, side by side: candidates of the same name, metric by metric.

Figures of two environments say nothing of the code, and those of two cases nothing at all. The first are refused unless
they are forced, and then marked in every row; the second always.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.bench.case.report import BenchReport, CaseRecord, read_report
from sdopt.bench.case.stats import PairVerdict, judge_pair
from sdopt.bench.measure.conditions import list_problems
from sdopt.errors import UsageError
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.perf.history.fingerprint import describe_change
from sdopt.perf.history.history import History, find_run
from sdopt.perf.history.nights import relative_change, take_value
from sdopt.perf.history.record import MetricKind, RunRecord, SeriesKey, SeriesRecord
from sdopt.perf.history.view import format_value
from sdopt.perf.night.series import list_series

OTHER_ENVIRONMENT = "different environments"
_REPORT_NAME = "report.json"
# All that decides what has to be computed. The bundles themselves may differ: that is what is compared.
_CASE_FIELDS = (
    "family", "scope", "width_px", "height_px", "batch", "prompts", "seed", "steps", "guidance_scale", "scheduler",
)  # fmt: skip
_TIMES = (MetricKind.TIME, MetricKind.START)


@dataclass(frozen=True)
class Side:
    """One of the two: where it was measured, and its series."""

    name: str
    environment: EnvironmentRecord
    logical_cores: int
    memory_bytes: int
    series: tuple[SeriesRecord, ...]
    dirty: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A series of both, values in the metric's unit. `change` is a part of `before`; of PSNR and SSIM a difference.

    `verdict` has the ratio "after is so many times as fast"; None for what is not a time.
    """

    key: SeriesKey
    before: float
    after: float
    change: float
    verdict: PairVerdict | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`environments` says in words what differs; with it, every row's note says that something does."""

    before: str
    after: str
    rows: tuple[Row, ...]
    environments: tuple[str, ...] = ()
    only_before: tuple[SeriesKey, ...] = ()
    only_after: tuple[SeriesKey, ...] = ()
    warnings: tuple[str, ...] = ()


def compare_files(before: str, after: str, history: History, *, force: bool = False) -> Comparison:
    """`before` and `after` are two reports (files, or folders with a `report.json`), or two ids of the history's runs,
    of which the start is enough, or `last`.

    Raises `UsageError` for a report and a run, different environments without `force`, different cases or suites, and
    ids that name no single run; `ArtifactError` for what cannot be read.
    """
    paths = [_find_report(name) for name in (before, after)]
    if paths[0] and paths[1]:
        return compare_reports(read_report(paths[0]), read_report(paths[1]), names=(before, after), force=force)
    if paths[0] or paths[1]:
        raise UsageError(
            f"{before} and {after} are a report and no report", hint="name two reports, or two runs of the history"
        )
    records = history.read().records
    return compare_runs(find_run(records, before), find_run(records, after), force=force)


def compare_reports(
    before: BenchReport, after: BenchReport, *, names: tuple[str, str] = ("A", "B"), force: bool = False
) -> Comparison:
    """Series are named by the case of `before`: there is one in each."""
    _require_same_case(before.case, after.case, names)
    sides = [_read_side(name, before.case.bundle, report) for name, report in zip(names, (before, after), strict=True)]
    return _compare(sides[0], sides[1], force)


def compare_runs(before: RunRecord, after: RunRecord, *, force: bool = False) -> Comparison:
    if before.suite_digest != after.suite_digest:
        raise UsageError(
            f"{before.id} and {after.id} were measured by different suites ({before.suite}, {after.suite})",
            hint="compare runs of one suite",
        )
    sides = [
        Side(run.id, run.environment, run.logical_cores, run.memory_bytes, run.series, run.dirty)
        for run in (before, after)
    ]
    return _compare(sides[0], sides[1], force)


def describe_row(row: Row) -> tuple[str, ...]:
    """Series, both values, the change and the verdict, as text."""
    metric = row.key.metric
    if not math.isfinite(row.change):
        change = "-"
    elif metric.kind in (MetricKind.PSNR, MetricKind.SSIM):
        change = f"{row.change:+.{2 if metric.kind is MetricKind.PSNR else 4}f}"
    else:
        change = f"{row.change:+.1%}"
    verdict = f"{row.verdict.speed}: {row.verdict.reason}" if row.verdict else ""
    note = f"({row.note})" if row.note else ""
    values = (format_value(metric, row.before), format_value(metric, row.after))
    return (str(row.key), *values, change, " ".join(filter(None, (verdict, note))))


def format_comparison(comparison: Comparison) -> str:
    """A table in plain text; lines end with a newline."""
    lines = [f"A  {comparison.before}", f"B  {comparison.after}"]
    if comparison.environments:
        lines.append(f"DIFFERENT ENVIRONMENTS: {', '.join(comparison.environments)}")
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    cells = [("series", "A", "B", "change", "B is"), *map(describe_row, comparison.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines.append("")
    for name, *values, verdict in cells:
        columns = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {'  '.join(columns)}  {verdict}".rstrip())
    lines += [f"only in A: {key}" for key in comparison.only_before]
    lines += [f"only in B: {key}" for key in comparison.only_after]
    return "\n".join(lines) + "\n"


def comparison_to_json(comparison: Comparison) -> str:
    """Infinite values, as of equal pictures, are the text `inf`."""
    table = {
        "before": comparison.before,
        "after": comparison.after,
        "same_environment": not comparison.environments,
        "environments": comparison.environments,
        "warnings": comparison.warnings,
        "rows": [_row_to_table(row) for row in comparison.rows],
        "only_before": [str(key) for key in comparison.only_before],
        "only_after": [str(key) for key in comparison.only_after],
    }
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row_to_table(row: Row) -> dict[str, Any]:
    table: dict[str, Any] = {
        **row.key.model_dump(mode="json"),
        **{name: _to_number(getattr(row, name)) for name in ("before", "after", "change")},
        "verdict": None,
        "note": row.note,
    }
    if (verdict := row.verdict) is not None:
        ratio = {name: _to_number(getattr(verdict.ratio, name)) for name in ("value", "low", "high")}
        table["verdict"] = {
            "speed": verdict.speed.value, "times_as_fast": ratio, "p_value": verdict.p_value, "reason": verdict.reason,
        }  # fmt: skip
    return table


def _to_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _find_report(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir():
        path = path / _REPORT_NAME
    return path if path.is_file() else None


def _read_side(name: str, case: str, report: BenchReport) -> Side:
    builds = [candidate.build_ns for candidate in report.candidates if candidate.build_ns is not None]
    series = list_series(case, report, builds[0] if builds else None)
    machine = report.machine
    return Side(
        name, report.environment, machine.logical_cores, machine.memory_bytes, tuple(series), list_problems(report)
    )


def _require_same_case(before: CaseRecord, after: CaseRecord, names: tuple[str, str]) -> None:
    differing = [name for name in _CASE_FIELDS if getattr(before, name) != getattr(after, name)]
    if before.inputs_digest and after.inputs_digest and before.inputs_digest != after.inputs_digest:
        differing.append("initial latents")
    if differing:
        raise UsageError(
            f"{names[0]} and {names[1]} measured different cases: "
            f"{', '.join(name.removesuffix('_px').replace('_', ' ') for name in differing)}",
            hint="measure both with the same prompts, sizes and steps",
        )


def _compare(before: Side, after: Side, force: bool) -> Comparison:
    environments = describe_change(before, after)
    if environments and not force:
        raise UsageError(
            f"{before.name} and {after.name} were measured in different environments: {', '.join(environments)}",
            hint="measure both on one machine with the same libraries, or compare with --force, which marks every row",
        )
    older, newer = ({series.key: series for series in side.series} for side in (before, after))
    note = OTHER_ENVIRONMENT if environments else ""
    rows = (_compare_series(older[key], newer[key], note) for key in older if key in newer)
    return Comparison(
        before.name, after.name, tuple(row for row in rows if row), environments,
        tuple(key for key in older if key not in newer), tuple(key for key in newer if key not in older),
        tuple(_list_warnings(before, after)),
    )  # fmt: skip


def _list_warnings(before: Side, after: Side) -> Sequence[str]:
    return [f"{side.name} is dirty: {reason}" for side in (before, after) for reason in side.dirty]


def _compare_series(before: SeriesRecord, after: SeriesRecord, note: str) -> Row | None:
    old, new = take_value(before), take_value(after)
    if old is None or new is None:
        return None
    kind = before.key.metric.kind
    if kind in (MetricKind.PSNR, MetricKind.SSIM):
        change = 0.0 if old == new else new - old
    else:
        change = relative_change(old, new)
    verdict = judge_pair(before.groups, after.groups) if kind in _TIMES else None
    return Row(before.key, old, new, change, verdict, note)
