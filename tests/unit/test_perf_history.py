"""The history: lines are only added, damage stays where it is and is told, and a clock changes no order."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import resource
import signal
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from sdopt.errors import ArtifactError, MissingHardware, UsageError
from sdopt.perf.history.history import LINE_LIMIT_BYTES, History, find_run, new_run_id
from sdopt.perf.history.record import SCHEMA_VERSION, Metric, RunRecord
from tests.planted_runs import make_key, make_nights, make_run

GOLDEN = Path(__file__).parent.parent / "golden" / "run.schema.json"
VALUES = {make_key(): 1e8, make_key(Metric.PSNR): ((45.5, math.inf),)}
RUNS = make_nights(3, VALUES)


@pytest.fixture
def history(tmp_path: Path) -> History:
    made = History(tmp_path / "perf" / "history.jsonl")
    for run in RUNS:
        made.append(run)
    return made


def test_the_format_is_the_one_that_is_written_down() -> None:
    """If this fails, the format changed: raise SCHEMA_VERSION unless old readers and old files still do.

    Then write the schema anew: python -m tests.unit.test_perf_history
    """
    assert RunRecord.model_json_schema() == json.loads(GOLDEN.read_bytes())


def test_runs_come_back_whole_and_in_order(history: History) -> None:
    contents = history.read()
    assert list(contents.records) == RUNS
    assert contents.damaged == ()
    assert contents.records[0].series[1].groups == ((45.5, math.inf),)


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    assert History(tmp_path / "none.jsonl").read().records == ()


def test_a_line_is_plain_json(history: History) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(name)

    for line in history.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("kept", [1, 100, -30])
def test_a_cut_line_swallows_nothing(history: History, kept: int) -> None:
    lines = history.path.read_bytes().splitlines(keepends=True)
    cut = lines[2][:kept]
    history.path.write_bytes(lines[0] + lines[1] + cut)
    added = make_run(7, VALUES)
    history.append(added)
    contents = history.read()
    assert list(contents.records) == [*RUNS[:2], added]
    assert [line.line_number for line in contents.damaged] == [3]
    assert history.path.read_bytes().startswith(lines[0] + lines[1] + cut + b"\n")


def test_a_line_that_lacks_only_its_end_is_a_run(history: History) -> None:
    history.path.write_bytes(history.path.read_bytes()[:-1])
    assert list(history.read().records) == RUNS
    history.append(make_run(7, VALUES))
    assert [run.id for run in history.read().records] == [*(run.id for run in RUNS), make_run(7, VALUES).id]
    assert history.read().damaged == ()


def edit_line(run: RunRecord, **changes: object) -> bytes:
    return json.dumps(json.loads(run.model_dump_json()) | changes).encode()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "empty"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"[1]", "run"),
        (edit_line(make_run(9, VALUES), colour="red"), "colour"),
        (edit_line(make_run(9, VALUES), schema_version=0), "schema_version"),
        (edit_line(make_run(9, VALUES), series=[{"key": 1}]), "series"),
        (edit_line(make_run(9, VALUES), series=[s.model_dump(mode="json") for s in RUNS[0].series[:1] * 2]), "twice"),
        (RUNS[0].model_dump_json().encode(), "a second time"),
        (b"x" * (LINE_LIMIT_BYTES + 5), "longer than"),
        (b"x" * (2 * LINE_LIMIT_BYTES - 1), "longer than"),
        (b"x" * (LINE_LIMIT_BYTES - 1), "longer than|no JSON"),
    ],
)
def test_a_damaged_line_is_told_with_its_number(history: History, line: bytes, words: str) -> None:
    lines = history.path.read_bytes().splitlines(keepends=True)
    history.path.write_bytes(lines[0] + line + b"\n" + lines[1] + lines[2])
    contents = history.read()
    assert list(contents.records) == RUNS
    (damaged,) = contents.damaged
    assert damaged.line_number == 2
    assert re.search(words, damaged.reason)


def test_a_newer_format_is_refused(history: History) -> None:
    with history.path.open("ab") as file:
        file.write(edit_line(RUNS[0], schema_version=SCHEMA_VERSION + 1, news=1) + b"\n")
    with pytest.raises(ArtifactError, match=f"line 4 has schema {SCHEMA_VERSION + 1}"):
        history.read()


def test_a_clock_that_steps_back_changes_no_order(history: History) -> None:
    earlier = make_run(-400, VALUES)
    history.append(earlier)
    assert earlier.id < RUNS[0].id
    assert [run.id for run in history.read().records] == [*(run.id for run in RUNS), earlier.id]


def test_a_run_that_no_line_can_hold_is_refused(history: History) -> None:
    before = history.path.read_bytes()
    huge = make_run(9, {make_key(): (tuple(1.0 + i for i in range(LINE_LIMIT_BYTES // 6)),)})
    with pytest.raises(ArtifactError, match="at most"):
        history.append(huge)
    assert history.path.read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_was(history: History) -> None:
    before = history.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(MissingHardware, match="disk is full"):
            history.append(make_run(9, VALUES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert history.path.read_bytes() == before


def append_nights(path: Path, first: int) -> None:
    for night in range(first, first + 20):
        History(path).append(make_run(night, VALUES))


def test_writers_at_once_mix_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_nights, args=(path, 100 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    contents = History(path).read()
    assert contents.damaged == ()
    assert {run.id for run in contents.records} == {
        make_run(100 * i + j, VALUES).id for i in range(3) for j in range(20)
    }


def test_ids_sort_by_time_and_differ_in_one_second() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    ids = {new_run_id(now) for _ in range(50)}
    assert len(ids) == 50
    assert all(run_id.startswith("20260102T030405Z-") and len(run_id) == 25 for run_id in ids)
    assert max(ids) < new_run_id(now + timedelta(seconds=1))
    assert new_run_id(now.astimezone(timezone(timedelta(hours=9)))).startswith("20260102T030405Z-")
    with pytest.raises(ValueError, match="time zone"):
        new_run_id(datetime(2026, 1, 2))


def test_a_run_is_found_by_the_start_of_its_id() -> None:
    assert find_run(RUNS, "20260102") == RUNS[1]
    assert find_run(RUNS, "last") == RUNS[2]
    for wanted, words in (("2026", "3 runs"), ("2027", "no run"), ("", "no run")):
        with pytest.raises(UsageError, match=words):
            find_run(RUNS, wanted)
    with pytest.raises(UsageError, match="no run"):
        find_run([], "last")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(RunRecord.model_json_schema(), indent=1, sort_keys=True) + "\n")
