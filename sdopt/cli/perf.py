"""`sdopt perf`: a suite measured night by night, and a gate that says when something became worse.

perf run -> a folder with the run -> perf gate -> its line in the history, a page, exit 0 or 3
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from sdopt import progress
from sdopt.cli.text import neutralise
from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.bench.case.suite import Suite
    from sdopt.perf.gate.bisect import Bisection
    from sdopt.perf.history.history import History
    from sdopt.perf.history.record import RunRecord, SeriesKey
    from sdopt.perf.night.worktree import Tree

_HISTORY = click.option(
    "--history", "history_file", type=click.Path(path_type=Path), envvar="SDOPT_HISTORY", show_envvar=True,
    default=Path("out/perf/history.jsonl"), show_default=True,
    help="A line for each run; folders of runs lie beside it, in runs.",
)  # fmt: skip
_SUITE = click.option(
    "--suite", default="nightly", show_default=True, metavar="NAME", help="Of configs/suites, or a TOML file."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


@click.group()
def perf() -> None:
    """Speed over time: measure a suite each night, and say when something became worse."""


@perf.command()
@_SUITE
@_HISTORY
@click.option("--manual", is_flag=True, help="A run by hand: recorded, but not used as a baseline.")
@click.option("--no-bridge", is_flag=True, help="In a new environment, do not measure the last good commit first.")
@_JSON
def run(suite: str, history_file: Path, manual: bool, no_bridge: bool, as_json: bool) -> None:
    """Build and measure every case of a suite with this code.

    The run waits for `sdopt perf gate` in a folder beside the history. A case that fails is in it; the others go on.
    """
    from sdopt.bench.case.suites import load_suite
    from sdopt.perf.history.history import History
    from sdopt.perf.history.record import RunKind
    from sdopt.perf.night.nightly import measure_suite, write_night
    from sdopt.perf.night.worktree import find_own_tree

    chosen, history, tree = load_suite(suite), History(history_file.absolute()), find_own_tree()
    kind = RunKind.MANUAL if manual else RunKind.NIGHTLY
    with progress.shown_on_stderr():
        if not (manual or no_bridge):
            _measure_bridge(chosen, history, tree)
        with tempfile.TemporaryDirectory(prefix="sdopt-perf-") as work:
            night = measure_suite(chosen, tree, Path(work), kind, shlex.join(["sdopt", *sys.argv[1:]]))
    folder = write_night(_runs(history_file), chosen, night)
    _tell_run(night.record)
    _say(f"{folder} waits for: sdopt perf gate")
    if as_json:
        table = night.record.model_dump(mode="json", exclude={"series"})
        print(json.dumps({"folder": str(folder), "run": table}))


@perf.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@_HISTORY
@click.option(
    "--confirm-minutes", type=click.FloatRange(0), default=20, show_default=True, metavar="MINUTES",
    help="Time for measuring suspects again beside the last good commit; 0 for none.",
)  # fmt: skip
@click.option("--accept", metavar="RUN", help="Skip the gate and accept an alarmed run as the new baseline.")
@_JSON
def gate(folder: Path | None, history_file: Path, confirm_minutes: float, accept: str | None, as_json: bool) -> None:
    """Judge the run in FOLDER, or the newest that waits, and add it to the history.

    Suspects are measured again in the same night, in turns with the last good commit. Writes gate.md, gate.html and
    gate.json into FOLDER. Exit code 3: something became worse (or much better), or was not measured.
    """
    from sdopt.perf.history.history import History
    from sdopt.perf.judge_run import accept_by_hand, find_pending, judge_run
    from sdopt.perf.page.alarm_page import describe_gate

    history = History(history_file.absolute())
    if accept is not None:
        if folder is not None:
            raise UsageError("--accept takes the id of a run, and no folder is judged with it")
        record = accept_by_hand(history, accept)
        _say(f"accepted: what follows is held against {record.commit[:12] or record.id}")
        if as_json:
            print(json.dumps({"accepted": accept, "id": record.id}))
        return
    with progress.shown_on_stderr():
        judged = judge_run(
            (folder or find_pending(_runs(history_file), history)).absolute(), history, confirm_s=confirm_minutes * 60
        )
    if as_json:
        print(judged.report.model_dump_json())
    _say(describe_gate(judged.report))
    for finding in judged.report.findings:
        _say(f"  {finding.sentence}")
    for note in judged.report.notes:
        _say(f"  note: {note}")
    _say(str(judged.page))
    sys.exit(judged.report.exit_code)


@perf.command()
@click.argument("span", metavar="GOOD..BAD")
@click.option("--series", required=True, metavar="CASE/CANDIDATE/METRIC", help="What became slower, as the gate says.")
@_SUITE
@_JSON
def bisect(span: str, series: str, suite: str, as_json: bool) -> None:
    """Find the commit that made a series slower: each step is measured in turns with the good commit.

    Commits that cannot be built or measured are passed over and named.
    """
    from sdopt.bench.case.suites import load_suite
    from sdopt.perf.gate.bisect import bisect as search
    from sdopt.perf.night.nightly import find_job
    from sdopt.perf.night.worktree import find_own_tree

    key = _parse_series(series)
    job = find_job(load_suite(suite), key.case)
    with progress.shown_on_stderr():
        found = search(find_own_tree().root, span, job, key.candidate, key.metric)
    _tell_bisection(found, find_own_tree())
    if as_json:
        tried = [
            {"commit": t.commit, "judgement": t.judgement, "change": t.change, "message": t.message}
            for t in found.tried
        ]  # fmt: skip
        table = {"good": found.good, "first_bad": found.first_bad, "suspects": found.suspects, "tried": tried}
        print(json.dumps(table))


@perf.command()
@click.argument("before")
@click.argument("after")
@_HISTORY
@click.option("--force", is_flag=True, help="Compare what was measured in different environments; it is marked.")
@_JSON
def compare(before: str, after: str, history_file: Path, force: bool, as_json: bool) -> None:
    """Compare two bench reports, or two runs of the history by the start of their ids (or `last`)."""
    from sdopt.perf.gate.compare_runs import compare_files, comparison_to_json, format_comparison
    from sdopt.perf.history.history import History

    comparison = compare_files(before, after, History(history_file), force=force)
    if as_json:
        print(comparison_to_json(comparison))
    print(format_comparison(comparison), end="", file=sys.stderr)


@perf.command()
@_HISTORY
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write a page of all series here.")
@click.option(
    "--export", "export_folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Write one run here for github-action-benchmark and pytest-benchmark's tools.",
)  # fmt: skip
@click.option("--run", "wanted", default="last", show_default=True, metavar="RUN", help="The run that --export writes.")
@_JSON
def history(history_file: Path, report: Path | None, export_folder: Path | None, wanted: str, as_json: bool) -> None:
    """Show the history: its runs and the last point of each series."""
    from sdopt.perf.history.history import History, find_run
    from sdopt.perf.history.index import view_indexed
    from sdopt.perf.page.benchmark_export import write_exports
    from sdopt.perf.page.page import format_history, write_history_page

    found = History(history_file)
    view = view_indexed(found)
    written = [*write_history_page(report, view)] if report is not None else []
    if export_folder is not None:
        written += write_exports(export_folder, find_run(found.read().records, wanted))
    if as_json:
        runs = [record.model_dump(mode="json", exclude={"series"}) for record in view.runs]
        print(json.dumps({"runs": runs, "written": [str(path) for path in written]}))
    print(format_history(view), end="", file=sys.stderr)
    for path in written:
        _say(str(path))


def _runs(history_file: Path) -> Path:
    return history_file.absolute().parent / "runs"


def _measure_bridge(suite: Suite, history: History, tree: Tree) -> None:
    from sdopt.perf.night.nightly import measure_bridge

    record = measure_bridge(suite, history.read().records, tree)
    if record is None:
        return
    if record.series:
        history.append(record)
        _say(f"new environment: {record.commit[:12]} was measured again, as a bridge")
    for failure in record.failures:
        _say(f"bridge: {failure.case} of {record.commit[:12]} failed: {failure.message}")


def _tell_run(record: RunRecord) -> None:
    _say(f"{record.id}: {len(record.series)} series in {record.wall_ns / 60e9:.1f} minutes")
    for failure in record.failures:
        _say(f"  {failure.case}/{failure.candidate or 'all candidates'} failed: {failure.message}")
    for reason in record.dirty:
        _say(f"  dirty: {reason}")


def _tell_bisection(found: Bisection, tree: Tree) -> None:
    from sdopt.perf.night.worktree import describe_commit

    for tried in found.tried:
        change = "" if tried.change is None else f" ({tried.change:+.1%})"
        _say(f"  {describe_commit(tree.root, tried.commit)}: {tried.judgement}{change} {tried.message}".rstrip())
    if found.first_bad:
        _say(f"first bad commit: {describe_commit(tree.root, found.first_bad)}")
    else:
        _say("the first bad commit is one of these; those between could not be measured:")
        for commit in found.suspects:
            _say(f"  {describe_commit(tree.root, commit)}")


def _parse_series(text: str) -> SeriesKey:
    from pydantic import ValidationError

    from sdopt.perf.history.record import Metric, SeriesKey

    try:
        case, candidate, metric = text.split("/")
        return SeriesKey(case=case, candidate=candidate, metric=Metric(metric))
    except (ValueError, ValidationError) as error:
        raise UsageError(
            f"{text!r} is not a series", hint=f"CASE/CANDIDATE/METRIC, with a metric of: {', '.join(Metric)}"
        ) from error


def _say(line: str) -> None:
    print(neutralise(line), file=sys.stderr)
