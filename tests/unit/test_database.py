"""Databases that can be made again: whatever is wrong with the file, the answer is that of a sound one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from sdopt.disk.database import Schema, transaction, use_database

SCHEMA = Schema(3, "CREATE TABLE numbers (number INTEGER); INSERT INTO numbers VALUES (1);")


def count(database: sqlite3.Connection) -> int:
    """How many looks the file has seen, this one included."""
    with transaction(database):
        database.execute("INSERT INTO numbers VALUES (1)")
    return int(database.execute("SELECT count(*) FROM numbers").fetchone()[0]) - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "numbers.sqlite"
    assert use_database(made, SCHEMA, count) == 1
    return made


def test_what_is_written_is_there_the_next_time(path: Path) -> None:
    assert [use_database(path, SCHEMA, count) for _ in range(2)] == [2, 3]


@pytest.mark.parametrize("contents", [None, b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_missing_or_damaged_is_made_anew(path: Path, contents: bytes | None) -> None:
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    assert [use_database(path, SCHEMA, count) for _ in range(2)] == [1, 2]


def test_a_file_of_another_version_is_made_anew(path: Path) -> None:
    assert use_database(path, Schema(4, SCHEMA.statements), count) == 1


def test_contents_that_are_refused_are_made_anew_once(path: Path) -> None:
    seen = []

    def refuse(database: sqlite3.Connection) -> int:
        seen.append(count(database))
        if seen[-1] > 1:
            raise sqlite3.DatabaseError("of something else")
        return seen[-1]

    assert use_database(path, SCHEMA, refuse) == 1
    assert seen == [2, 1]


def test_what_is_wrong_with_every_database_is_raised(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        use_database(path, SCHEMA, lambda database: database.execute("SELECT 1 FROM nowhere"))


def test_where_no_file_can_be_it_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert [use_database(tmp_path / "folder", SCHEMA, count) for _ in range(2)] == [1, 1]
    assert use_database(tmp_path / "missing" / "file", SCHEMA, count) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_fails_in_a_transaction_leaves_nothing(path: Path) -> None:
    def fail(database: sqlite3.Connection) -> None:
        with transaction(database):
            database.execute("INSERT INTO numbers VALUES (1)")
            raise KeyError

    with pytest.raises(KeyError):
        use_database(path, SCHEMA, fail)
    assert use_database(path, SCHEMA, count) == 2
