"""The files of a report: one page to send, the record it was made of, and its samples for a spreadsheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdopt.bench.case.report import write_report
from sdopt.bench.page.csv_export import format_samples, format_summary
from sdopt.bench.page.render import IndexEntry, render_html, render_index
from sdopt.bench.run import BenchResult
from sdopt.disk.files import write_file


def write_report_files(folder: Path, result: BenchResult) -> Path:
    """Write report.json, report.csv (every sample), summary.csv and report.html to an existing folder.

    Returns the path of the page, which is written last. Raises `MissingDependency` (extra `report`) without Jinja2 or
    matplotlib.
    """
    page = folder / "report.html"
    write_report(folder / "report.json", result.report)
    write_file(folder / "report.csv", format_samples(result.report).encode())
    write_file(folder / "summary.csv", format_summary(result.report).encode())
    write_file(page, render_html(result).encode())
    return page


def write_index(folder: Path, title: str, entries: Sequence[IndexEntry]) -> Path:
    """Write index.html, which links the reports of several runs. Returns its path."""
    page = folder / "index.html"
    write_file(page, render_index(title, entries).encode())
    return page
