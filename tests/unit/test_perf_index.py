"""The index says what the history says, and losing it, or finding another's, changes nothing."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.disk import database as database_room
from sdopt.errors import ArtifactError
from sdopt.perf.history import index
from sdopt.perf.history.history import History
from sdopt.perf.history.index import index_path, view_indexed
from sdopt.perf.history.record import Metric
from sdopt.perf.history.view import HistoryView, view_history
from tests.planted_runs import NEWER_ENVIRONMENT, make_key, make_nights, make_run

VALUES = {make_key(): 1e8, make_key(Metric.PSNR): ((45.5, math.inf),), make_key(case="it's; DROP TABLE runs"): 2e9}


@pytest.fixture
def history(tmp_path: Path) -> History:
    made = History(tmp_path / "history.jsonl")
    for run in make_nights(4, VALUES):
        made.append(run)
    return made


def view_directly(history: History) -> HistoryView:
    return view_history(history.read())


lines = st.one_of(
    st.integers(0, 20).map(lambda n: make_run(n, {make_key(): 1e8 + n}).model_dump_json().encode() + b"\n"),
    st.integers(0, 20).map(
        lambda n: make_run(n, VALUES, environment=NEWER_ENVIRONMENT).model_dump_json().encode() + b"\n"
    ),
    st.binary(max_size=30),
    st.just(make_run(30, VALUES).model_dump_json().encode()[:-20]),
    st.just(make_run(31, VALUES).model_dump_json().encode()),
    st.just(b"\n"),
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(lines, max_size=4), min_size=1, max_size=4))
def test_it_says_what_the_history_says(parts: list[list[bytes]]) -> None:
    """Whatever is appended between two looks: runs, damage, runs that are cut, runs a second time."""
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "h.jsonl")
        for part in parts:
            with history.path.open("ab") as file:
                file.write(b"".join(part))
            assert view_indexed(history) == view_directly(history)
        history.append(make_run(40, VALUES))
        assert view_indexed(history) == view_directly(history)


def test_no_history_is_an_empty_view_and_makes_no_file(tmp_path: Path) -> None:
    assert view_indexed(History(tmp_path / "h.jsonl")) == HistoryView()
    assert list(tmp_path.iterdir()) == []


def test_deleting_it_loses_nothing(history: History) -> None:
    first = view_indexed(history)
    index_path(history).unlink()
    assert view_indexed(history) == first == view_directly(history)
    assert index_path(history).is_file()


def test_a_second_look_reads_no_line_and_a_third_only_the_new_one(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    view_indexed(history)
    starts = []
    parse = index.parse_lines
    monkeypatch.setattr(index, "parse_lines", lambda file, *rest: starts.append(file.tell()) or parse(file, *rest))
    view_indexed(history)
    assert starts == []
    size = history.path.stat().st_size
    history.append(make_run(9, VALUES))
    assert len(view_indexed(history).runs) == 5
    assert starts == [size]


@pytest.mark.parametrize("damage", [b"", b"no database at all", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_index_is_made_anew(history: History, damage: bytes) -> None:
    view_indexed(history)
    index_path(history).write_bytes(damage)
    assert view_indexed(history) == view_directly(history)
    with sqlite3.connect(index_path(history)) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (4,)
    database.close()


def test_an_index_with_a_broken_page_is_made_anew(history: History) -> None:
    for run in make_nights(80, VALUES, first=10):
        history.append(run)
    view_indexed(history)
    data = bytearray(index_path(history).read_bytes())
    for page in range(4096, len(data) - 4096, 4096):
        data[page : page + 64] = b"\xee" * 64
    index_path(history).write_bytes(data)
    assert view_indexed(history) == view_directly(history)


@pytest.mark.parametrize(
    "statement",
    ["PRAGMA user_version = 99", "DROP TABLE points", "DELETE FROM source", "ALTER TABLE runs RENAME TO old_runs"],
)
def test_an_index_of_another_version_is_made_anew(history: History, statement: str) -> None:
    view_indexed(history)
    database = sqlite3.connect(index_path(history))
    database.execute(statement)
    database.commit()
    database.close()
    assert view_indexed(history) == view_directly(history)
    history.append(make_run(9, VALUES))
    assert view_indexed(history) == view_directly(history)


def test_another_history_in_its_place_is_noticed(history: History) -> None:
    """Of the same size and with the same times: a copy that keeps them, of a run whose figures are others."""
    view_indexed(history)
    stat = history.path.stat()
    other = history.path.with_name("other.jsonl")
    other.write_bytes(history.path.read_bytes().replace(b",100", b",900"))
    shutil.move(other, history.path)
    os.utime(history.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert history.path.stat().st_size == stat.st_size
    assert view_indexed(history) == view_directly(history)
    assert max(point.high for point in view_indexed(history).points[make_key()]) > 8e8


def test_a_history_that_became_shorter_is_noticed(history: History) -> None:
    view_indexed(history)
    history.path.write_bytes(b"".join(history.path.read_bytes().splitlines(keepends=True)[:2]))
    assert [run.id for run in view_indexed(history).runs] == [run.id for run in make_nights(2, VALUES)]


def test_where_it_cannot_be_written_the_answer_is_the_same(history: History) -> None:
    index_path(history).mkdir()
    assert view_indexed(history) == view_directly(history)


def test_an_index_that_another_process_writes_is_left_alone(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    view_indexed(history)
    inode = index_path(history).stat().st_ino
    history.append(make_run(40, VALUES))
    connect = sqlite3.connect
    monkeypatch.setattr(database_room.sqlite3, "connect", lambda place, **how: connect(place, timeout=0, **how))
    writer = connect(index_path(history), isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert view_indexed(history) == view_directly(history)
    assert index_path(history).stat().st_ino == inode
    writer.execute("ROLLBACK")
    writer.close()
    assert view_indexed(history) == view_directly(history)
    assert index_path(history).stat().st_ino == inode


def test_a_newer_format_is_refused_as_in_the_history(history: History) -> None:
    view_indexed(history)
    with history.path.open("ab") as file:
        file.write(b'{"schema_version": 99}\n')
    for _ in range(2):
        with pytest.raises(ArtifactError, match="schema 99"):
            view_indexed(history)
