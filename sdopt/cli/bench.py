"""`sdopt bench`: how fast a bundle's engines are beside torch and others, what they cost in memory, and what they
draw.
"""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from sdopt import progress
from sdopt.cli.text import TRUST_ENGINE_HELP, neutralise
from sdopt.errors import MissingDependency, UsageError
from sdopt.model.request import STEPS_LIMIT

if TYPE_CHECKING:
    from sdopt.bench.case.report import BenchReport
    from sdopt.bench.page.summary import CandidateSummary
    from sdopt.bench.run import BenchRequest, BenchResult
    from sdopt.model.lora import LoraUse


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Write report.html, .json and .csv here."
)
@click.option(
    "--against",
    metavar="LIST",
    help="What to measure beside the engines: eager, eager-fp32, eager-bf16, eager-fp16, compile, "
    "compile-max-autotune, attention, flash-attn, optimum, or the folder of another bundle.  [default: "
    "eager-fp32,eager-bf16,compile; beside engines of a GPU eager-fp16,compile-max-autotune]",
)
@click.option(
    "--suite", metavar="NAME", help="What to measure: a file of configs/suites, or a path. Other options override it."
)
@click.option("--repeats", type=int, help="Processes for each candidate.  [default: 3, "
              "and 2 for one more than three times as slow as the engines]")  # fmt: skip
@click.option("--steps", type=int, help="Steps of the scheduler.  [default: 20]")
@click.option(
    "--prompt", "prompts", multiple=True, help="What to draw; several times for several.  [default: the bundle's]"
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=float,
    metavar="SECONDS",
    help="For each process; a candidate that takes longer is reported as failed.  [default: 1800]",
)
@click.option(
    "--peer-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="PATH",
    help="Interpreter of the environment that has optimum.",
)
@click.option("--lora", "loras", multiple=True, metavar="FILE:WEIGHT",
              help="Draw with this LoRA in the slots, beside the engines without it. Torch has it in its weights, "
              "and --against takes a bundle that was converted with it.")  # fmt: skip
@click.option("--layers", is_flag=True, help="Find the first layer where the engines and torch part.")
@click.option(
    "--weights", multiple=True, metavar="NAME=PATH", help="Local weights of a metric: lpips=FILE or clip=FOLDER."
)
@click.option("--trust-engine", "trust_engines", multiple=True, metavar="SHA256", help=TRUST_ENGINE_HELP)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output; an array for several.")
def bench(
    folder: Path,
    report: Path | None,
    against: str | None,
    suite: str | None,
    repeats: int | None,
    steps: int | None,
    prompts: tuple[str, ...],
    time_limit_s: float | None,
    peer_python: Path | None,
    loras: tuple[str, ...],
    layers: bool,
    weights: tuple[str, ...],
    trust_engines: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the bundle in FOLDER: latency by stage, memory, and the pictures, beside torch on the same
    weights.

    Every candidate runs in fresh processes, interleaved with the others. One that fails becomes a row with
    its message.
    """
    from sdopt.bench.case.baselines import parse_against
    from sdopt.bench.case.suites import expand, load_suite
    from sdopt.bench.run import BenchRequest, apply_run
    from sdopt.fidelity.perceptual.local_weights import parse_weights

    _require_range("--repeats", repeats, "a whole number", 1, 100)
    _require_range("--steps", steps, "a whole number", 1, STEPS_LIMIT)
    _require_range("--time-limit", time_limit_s, "a number of seconds", 1)
    given: dict[str, Any] = {
        "against": None if against is None else parse_against(against), "steps": steps, "prompts": prompts or None,
        "repeats": repeats, "time_limit_s": time_limit_s,
    }  # fmt: skip
    base = BenchRequest(
        folder, command=shlex.join(["sdopt", *sys.argv[1:]]), trust_engines=trust_engines, peer_python=peer_python,
        perceptual=parse_weights(weights), layers=layers, loras=tuple(_find_lora(text) for text in loras),
    )  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    if suite is None:
        requests = {"": replace(base, **chosen)}
    else:
        loaded = load_suite(suite)
        requests = {run.name: replace(apply_run(base, loaded.name, run), **chosen) for run in expand(loaded)}
    if report is not None:
        _prepare(report)
    results = _run_all(requests, report)
    if as_json:
        sys.stdout.write(_format_json([result.report for result in results]))
    if any(_engines_failed(result.report) for result in results):
        # Told by the table and in the JSON; a second message would break the one JSON document.
        sys.exit(1)


def _find_lora(text: str) -> LoraUse:
    from sdopt.disk.files import hash_file
    from sdopt.model.lora import LoraUse, parse_lora

    choice = parse_lora(text)
    path = Path(choice.source).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="--lora takes the file of a LoRA, and after a colon its weight")
    return LoraUse(source=str(path), unet=choice.unet, text=choice.text, sha256=hash_file(path))


def _require_range(flag: str, value: float | None, kind: str, least: int, most: int | None = None) -> None:
    if value is not None and not least <= value <= (math.inf if most is None else most):
        accepted = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise UsageError(f"{flag} is {value:g}, and has to be {kind} {accepted}")


def _run_all(requests: Mapping[str, BenchRequest], report: Path | None) -> list[BenchResult]:
    """Run one after the other; each is shown, and with a `report` folder written, when it is done."""
    from sdopt.bench.run import run_bench

    results = []
    for name, request in requests.items():
        with tempfile.TemporaryDirectory(prefix="sdopt-bench-") as work, progress.shown_on_stderr():
            result = run_bench(request, Path(work))
        results.append(result)
        _print_table(result.report)
        if report is not None:
            _write(report / name if len(requests) > 1 else report, result)
    if report is not None and len(requests) > 1:
        _write_index(report, dict(zip(requests, results, strict=True)))
    return results


def _format_json(reports: Sequence[BenchReport]) -> str:
    documents = [report.to_json().decode().rstrip() for report in reports]
    return (documents[0] if len(documents) == 1 else f"[{','.join(documents)}]") + "\n"


def _prepare(report: Path) -> None:
    """Fail before the work, not after it: without the libraries of the report, and for a folder that cannot
    be.
    """
    from sdopt.disk.files import disk_errors

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
    from sdopt.bench.page.report_files import write_report_files

    folder.mkdir(exist_ok=True)
    print(write_report_files(folder, result), file=sys.stderr)


def _write_index(folder: Path, results: Mapping[str, BenchResult]) -> None:
    from sdopt.bench.page.render import IndexEntry
    from sdopt.bench.page.report_files import write_index

    entries = [IndexEntry(name, f"{name}/report.html", result.report) for name, result in results.items()]
    first = entries[0].report
    title = f"{first.case.bundle}, suite {first.method.suite}"
    print(write_index(folder, title, entries), file=sys.stderr)


def _print_table(report: BenchReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sdopt.bench.case.candidates import ENGINES
    from sdopt.bench.case.report import Scope, Status
    from sdopt.bench.page.pairs import judge_pairs, lay_out_matrix
    from sdopt.bench.page.summary import describe_result, format_bytes, format_speed, summarize_candidates

    draws = report.case.scope is Scope.PICTURES
    what = f"{report.case.steps} steps" if draws else "one step of the UNet"
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=escape(neutralise(f"{report.case.bundle}, {what}")),
        title_justify="left", collapse_padding=True,
    )  # fmt: skip
    rows = summarize_candidates(report)
    on_gpu = any(row.peak_device_bytes is not None for row in rows)
    # Of 80 characters the figures take what they need, and labels are wrapped into the rest.
    table.add_column("", overflow="fold")
    names = [*(["one\ncall"] if draws else []), "UNet\nstep", "speed", "cold\nstart", "memory"]
    for column in (*names, *(["GPU\nmemory"] if on_gpu else []), *(["PSNR\ndB"] if draws else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        label = escape(neutralise(row.record.label))
        if row.record.status is not Status.OK or row.whole is None:
            table.add_row(label, row.record.status.value)
            continue
        device = [format_bytes(row.peak_device_bytes)] if on_gpu else []
        table.add_row(label, *_format_row(row, draws=draws, device=device))
    console = Console(stderr=True)
    console.print(table)
    for pair in lay_out_matrix(judge_pairs(report)).get(ENGINES, {}).values():
        verdict = f"{pair.verdict.speed}, {format_speed(pair.verdict.ratio)} ({pair.verdict.reason})"
        said = f"{pair.candidate.label} against {pair.against.label}: {verdict}"
        console.print(escape(neutralise(said)))
    for candidate in report.candidates:
        if candidate.status is not Status.OK:
            console.print(escape(neutralise(f"{candidate.label} {candidate.status}: {candidate.message}")))
    console.print(escape(neutralise(describe_result(report))))


def _format_row(row: CandidateSummary, *, draws: bool, device: Sequence[str]) -> list[str]:
    """The cells behind the label."""
    from sdopt.bench.case.report import Stage
    from sdopt.bench.page.summary import NOT_MEASURED, format_bytes, format_ns
    from sdopt.fidelity.compare_drawings import format_psnr

    step = row.stages.get(Stage.UNET_STEP)
    psnr = NOT_MEASURED if row.worst_psnr_db is None else format_psnr(row.worst_psnr_db).removesuffix(" dB")
    return [
        *([format_ns(row.whole.median_ns if row.whole else None)] if draws else []),
        format_ns(step.median_ns if step else None),
        f"{row.speed.value:.2f}x" if row.speed else NOT_MEASURED,
        format_ns(row.cold_start_ns),
        format_bytes(row.peak_rss_bytes),
        *device,
        *([psnr] if draws else []),
    ]


def _engines_failed(report: BenchReport) -> bool:
    from sdopt.bench.case.candidates import ENGINES
    from sdopt.bench.case.report import Status

    engines = report.candidate(ENGINES)
    return engines is not None and engines.status is not Status.OK
