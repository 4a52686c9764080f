"""A measured night before the gate: judged by the history, confirmed in the same night, appended with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sdopt.disk.files import write_file
from sdopt.errors import UsageError
from sdopt.perf.gate.confirm import SameNight
from sdopt.perf.gate.findings import GateReport
from sdopt.perf.gate.gate import judge_night
from sdopt.perf.history.history import History, find_run, new_run_id
from sdopt.perf.history.nights import accept_run, find_last_good
from sdopt.perf.history.record import RunRecord
from sdopt.perf.night.nightly import RUN_NAME, read_night
from sdopt.perf.night.worktree import find_own_tree
from sdopt.perf.page.alarm_page import render_markdown, render_page


@dataclass(frozen=True)
class Judged:
    """A night's record with its verdict, what the gate says of it, and the page that it wrote."""

    record: RunRecord
    report: GateReport
    page: Path


def find_pending(runs: Path, history: History) -> Path:
    """The newest folder of a run that is not in the history yet. Raises `UsageError` where there is none."""
    known = {record.id for record in history.read().records}
    waiting = [path.parent for path in sorted(runs.glob(f"*/{RUN_NAME}")) if path.parent.name not in known]
    if not waiting:
        raise UsageError(f"no run of {runs} waits for the gate", hint="sdopt perf run measures one")
    return waiting[-1]


def judge_run(folder: Path, history: History, *, confirm_s: float) -> Judged:
    """Judge the run in `folder`, write `gate.json`, `gate.md` and `gate.html` into it, and append it to the history.

    With `confirm_s` of 0 there is no A/B. A run that is in the history is judged again by what was before it, and not
    appended a second time. Raises `ArtifactError` for a folder or a history that cannot be read.
    """
    suite, record = read_night(folder)
    records = history.read().records
    place = next((index for index, known in enumerate(records) if known.id == record.id), len(records))
    before = records[:place]
    good, own = find_last_good(before, record), find_own_tree()
    confirm, obstacle = None, ""
    if good is not None and good.commit and confirm_s:
        if (own.commit, own.changed) == (record.commit, record.changed):
            confirm = SameNight(suite, own, good.commit, confirm_s)
        else:
            obstacle = "no A/B: the code that runs now is not that of the run"
    report = judge_night(before, record, confirm)
    obstacle = obstacle or (confirm.obstacle if confirm else "")
    if obstacle:
        report = report.model_copy(update={"notes": (*report.notes, obstacle)})
    record = record.model_copy(update={"verdict": report.recorded_verdict})
    write_file(folder / "gate.json", report.to_json())
    write_file(folder / "gate.html", render_page(report, record).encode())
    write_file(folder / "gate.md", render_markdown(report, record).encode())
    if place == len(records):
        history.append(record)
    return Judged(record, report, folder / "gate.md")


def accept_by_hand(history: History, wanted: str) -> RunRecord:
    """Append that a person accepts a run that alarmed: what follows is held against it. Returns the new line.

    Raises `UsageError` where there is no such run.
    """
    now = datetime.now(UTC)
    record = accept_run(
        find_run(history.read().records, wanted), id=new_run_id(now), created_utc=now.isoformat(timespec="seconds")
    )
    history.append(record)
    return record
