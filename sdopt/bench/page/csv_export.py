"""A report as tables for a spreadsheet: every raw sample a row, and a row of figures for each stage."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from sdopt.bench.case.report import BenchReport, CandidateRecord, ProcessRecord
from sdopt.bench.page.summary import summarize_candidates

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")

SAMPLE_COLUMNS = ("case", "candidate", "process", "stage", "steps", "index", "ns")
SUMMARY_COLUMNS = (
    "case", "candidate", "label", "status", "stage", "count", "median_ns", "min_ns", "p90_ns", "p95_ns", "p99_ns",
    "max_ns", "cv", "times_as_fast", "times_as_fast_low", "times_as_fast_high", "worst_psnr_db", "peak_rss_bytes",
    "message",
)  # fmt: skip


def format_samples(report: BenchReport) -> str:
    """Long form, a row for each sample. `process` is its place in the order of the run; `stage` is a stage, or
    `warm_up` for calls that do not count, or `sweep` for those with another number of steps.
    """
    return _write(SAMPLE_COLUMNS, _list_samples(report))


def format_summary(report: BenchReport) -> str:
    """A row for each candidate and stage; one without a stage for a candidate that was not measured."""
    return _write(SUMMARY_COLUMNS, _list_figures(report))


def quote_formula(text: str) -> str:
    """Text that a spreadsheet would compute, as text."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _list_samples(report: BenchReport) -> Iterator[Sequence[object]]:
    for record in report.candidates:
        for process in record.processes:
            for stage, steps, samples in _list_series(report, process):
                for index, ns in enumerate(samples):
                    yield report.case.bundle, record.name, process.position, stage, steps, index, ns


def _list_series(report: BenchReport, process: ProcessRecord) -> Iterator[tuple[str, int, Sequence[int]]]:
    steps = report.case.steps
    yield "warm_up", steps, process.warm_up_ns
    for stage, samples in process.samples_ns.items():
        yield stage.value, steps, samples
    for count, samples in process.sweep_ns.items():
        yield "sweep", count, samples


def _list_figures(report: BenchReport) -> Iterator[Sequence[object]]:
    for row in summarize_candidates(report):
        record = row.record
        psnr_db = "" if row.worst_psnr_db is None else row.worst_psnr_db
        ends = (psnr_db, row.peak_rss_bytes or "", record.message)
        for stage, summary in row.stages.items():
            speed = row.speed if stage is row.main_stage else None
            ratio = (speed.value, speed.low, speed.high) if speed else ("", "", "")
            figures = (
                summary.count, summary.median_ns, summary.min_ns, summary.p90_ns, summary.p95_ns, summary.p99_ns,
                summary.max_ns, summary.variation,
            )  # fmt: skip
            yield *_name(report, record), stage.value, *figures, *ratio, *ends
        if not row.stages:
            yield *_name(report, record), "", *[""] * 11, *ends


def _name(report: BenchReport, record: CandidateRecord) -> tuple[str, str, str, str]:
    return report.case.bundle, record.name, record.label, record.status.value


def _write(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(columns)
    writer.writerows([quote_formula(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return buffer.getvalue()
