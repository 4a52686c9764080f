"""`sdopt bench`: how fast a bundle's engines are beside torch, what they cost in memory, and what they
draw.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from sdopt import progress
from sdopt.cli.text import TRUST_ENGINE_HELP, neutralise
from sdopt.errors import MissingDependency, UsageError

if TYPE_CHECKING:
    from sdopt.bench.report import BenchReport
    from sdopt.bench.run import BenchResult


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Write report.html and report.json here."
)
@click.option(
    "--against",
    metavar="LIST",
    help="What of torch to measure beside the engines.  [default: eager-fp32,eager-bf16,compile; beside engines of a "
    "GPU eager-fp16,compile]",
)
@click.option(
    "--repeats", type=click.IntRange(1, 100), default=2, show_default=True, help="Processes for each candidate."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Steps of the scheduler.")
@click.option(
    "--prompt", "prompts", multiple=True, help="What to draw; several times for several.  [default: the bundle's]"
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(1),
    default=1800,
    show_default=True,
    metavar="SECONDS",
    help="For each process; a candidate that takes longer is reported as failed.",
)
@click.option("--trust-engine", "trust_engines", multiple=True, metavar="SHA256", help=TRUST_ENGINE_HELP)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output.")
def bench(
    folder: Path,
    report: Path | None,
    against: str | None,
    repeats: int,
    steps: int,
    prompts: tuple[str, ...],
    time_limit_s: float,
    trust_engines: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the bundle in FOLDER: latency by stage, memory, and the pictures, beside torch on the same
    weights.

    Every candidate runs in fresh processes, interleaved with the others. One that fails becomes a row with
    its message.
    """
    from sdopt.bench.candidates import parse_against
    from sdopt.bench.run import BenchRequest, run_bench

    request = BenchRequest(
        folder,
        None if against is None else parse_against(against),
        prompts,
        steps,
        repeats,
        time_limit_s,
        command=shlex.join(["sdopt", *sys.argv[1:]]),
        trust_engines=trust_engines,
    )
    if report is not None:
        _prepare(report)
    with tempfile.TemporaryDirectory(prefix="sdopt-bench-") as work, progress.shown_on_stderr():
        result = run_bench(request, Path(work))
    if as_json:
        sys.stdout.write(result.report.to_json().decode())
    _print_table(result.report)
    if report is not None:
        _write(report, result)
    if _engines_failed(result.report):
        # Told by the table and in the JSON; a second message would break the one JSON document.
        sys.exit(1)


def _prepare(report: Path) -> None:
    """Fail before the work, not after it: without the libraries of the report, and for a folder that cannot
    be.
    """
    from sdopt.artifacts.files import disk_errors

    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency.of(error.name or "jinja2", extra="report") from error
    try:
        with disk_errors(report):
            report.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{report} cannot be a folder: a file is in its place", hint="choose another --report"
        ) from error


def _write(folder: Path, result: BenchResult) -> None:
    from sdopt.artifacts.files import write_file
    from sdopt.bench.render import render_html
    from sdopt.bench.report import write_report

    write_report(folder / "report.json", result.report)
    write_file(folder / "report.html", render_html(result).encode())
    print(folder / "report.html", file=sys.stderr)


def _print_table(report: BenchReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sdopt.bench.report import Stage, Status
    from sdopt.bench.summary import (
        NOT_MEASURED,
        describe_result,
        format_bytes,
        format_ns,
        summarize_candidates,
    )
    from sdopt.fidelity.verdict import format_psnr

    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=escape(neutralise(f"{report.case.bundle}, {report.case.steps} steps")),
        title_justify="left",
    )
    rows = summarize_candidates(report)
    on_gpu = any(row.peak_device_bytes is not None for row in rows)
    memory = ("memory", "GPU memory") if on_gpu else ("memory",)
    for column in ("", "one call", "UNet step", "speed", "cold start", *memory, "PSNR"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if row.record.status is not Status.OK or row.whole is None:
            table.add_row(escape(row.record.label), row.record.status.value)
            continue
        step = row.stages.get(Stage.UNET_STEP)
        table.add_row(
            escape(row.record.label),
            format_ns(row.whole.median_ns),
            format_ns(step.median_ns if step else None),
            f"{row.speed.value:.2f}x" if row.speed else NOT_MEASURED,
            format_ns(row.cold_start_ns),
            format_bytes(row.peak_rss_bytes),
            *([format_bytes(row.peak_device_bytes)] if on_gpu else []),
            NOT_MEASURED if row.worst_psnr_db is None else format_psnr(row.worst_psnr_db),
        )
    console = Console(stderr=True)
    console.print(table)
    for candidate in report.candidates:
        if candidate.status is not Status.OK:
            console.print(escape(neutralise(f"{candidate.label} {candidate.status}: {candidate.message}")))
    console.print(escape(neutralise(describe_result(report))))


def _engines_failed(report: BenchReport) -> bool:
    from sdopt.bench.candidates import ENGINES
    from sdopt.bench.report import Status

    engines = report.candidate(ENGINES)
    return engines is not None and engines.status is not Status.OK
