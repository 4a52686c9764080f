"""The history's points in an SQLite file beside it, so that years of nights are shown without reading every sample.

Nothing is only here: the file is made anew from the history whenever it is missing, damaged, of another version, or not
of this history. Where it cannot be written, it is made in memory.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdopt.disk.database import Schema, transaction, use_database
from sdopt.disk.locks import lock_open_file
from sdopt.errors import ArtifactError
from sdopt.perf.history.history import DamagedLine, History, gather_lines, parse_lines
from sdopt.perf.history.record import Metric, RunRecord, SeriesKey
from sdopt.perf.history.view import HistoryView, Point, list_points, without_samples

_CHUNK_BYTES = 4 << 20
_TABLES = """
CREATE TABLE source (lines INTEGER, bytes INTEGER, digest TEXT, stamp TEXT);
INSERT INTO source VALUES (0, 0, '', '');
CREATE TABLE runs (place INTEGER PRIMARY KEY, id TEXT UNIQUE, created_utc TEXT, kind TEXT, suite_digest TEXT,
                   commit_hash TEXT, fingerprint TEXT, verdict TEXT, record TEXT);
CREATE TABLE series (number INTEGER PRIMARY KEY, case_name TEXT, candidate TEXT, metric TEXT,
                     UNIQUE (case_name, candidate, metric));
CREATE TABLE points (series INTEGER, run INTEGER, value REAL, low REAL, high REAL, PRIMARY KEY (series, run))
    WITHOUT ROWID;
CREATE TABLE damaged (line_number INTEGER, reason TEXT);
"""
# The version is also of what a point is.
_SCHEMA = Schema(1, _TABLES)


def index_path(history: History) -> Path:
    return history.path.with_name(history.path.name + ".sqlite")


def view_indexed(history: History) -> HistoryView:
    """What `view_history(history.read())` gives, from the index, which is brought up to date first.

    Raises `ArtifactError` for a history that cannot be read or was written by a newer sdopt.
    """
    try:
        with history.path.open("rb") as file:
            lock_open_file(file.fileno(), shared=True)
            return use_database(
                index_path(history), _SCHEMA, lambda database: _view_database(database, file, history.path)
            )
    except FileNotFoundError:
        return HistoryView()
    except OSError as error:
        raise ArtifactError(f"cannot read {history.path}: {error.strerror}") from error


def _view_database(database: sqlite3.Connection, file: BinaryIO, path: Path) -> HistoryView:
    _update(database, file, path)
    return _read_view(database)


@dataclass(frozen=True)
class _Source:
    """The part of the history that is in the index."""

    lines: int
    size_bytes: int
    digest: str
    stamp: str


def _update(database: sqlite3.Connection, file: BinaryIO, path: Path) -> None:
    stamp = _stamp(file)
    if _read_source(database).stamp == stamp:
        return
    with transaction(database):
        known = _read_source(database)
        if not _continues(file, known):
            raise sqlite3.DatabaseError("the index of another history")
        file.seek(known.size_bytes)
        lines = list(parse_lines(file, path, known.lines + 1))
        _add_lines(database, lines, known.lines)
        size_bytes = file.tell()
        source = (known.lines + len(lines), size_bytes, _digest(file, size_bytes), stamp)
        database.execute("UPDATE source SET (lines, bytes, digest, stamp) = (?, ?, ?, ?)", source)


def _read_source(database: sqlite3.Connection) -> _Source:
    row = database.execute("SELECT lines, bytes, digest, stamp FROM source").fetchone()
    if row is None:
        raise sqlite3.DatabaseError("an index that does not say of what")
    return _Source(*row)


def _continues(file: BinaryIO, known: _Source) -> bool:
    """Whether the file begins with the very bytes that are indexed, and these end with a whole line."""
    if not known.size_bytes:
        return True
    file.seek(known.size_bytes - 1)
    return file.read(1) == b"\n" and _digest(file, known.size_bytes) == known.digest


def _digest(file: BinaryIO, size_bytes: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while size_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, size_bytes))):
        digest.update(chunk)
        size_bytes -= len(chunk)
    return digest.hexdigest()


def _stamp(file: BinaryIO) -> str:
    """What changes with every write, and with a file that took the place of another."""
    stat = os.fstat(file.fileno())
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _add_lines(database: sqlite3.Connection, lines: list[RunRecord | DamagedLine], first: int) -> None:
    known = {run_id for (run_id,) in database.execute("SELECT id FROM runs")}
    contents = gather_lines(iter(lines), first_number=first + 1, known=known)
    database.executemany("INSERT INTO damaged VALUES (?, ?)", [(d.line_number, d.reason) for d in contents.damaged])
    for place, record in enumerate(contents.records, len(known)):
        database.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (place, record.id, record.created_utc, record.kind, record.suite_digest, record.commit, record.fingerprint,
             record.verdict, without_samples(record).model_dump_json()),
        )  # fmt: skip
        for key, point in list_points(record, place):
            name = (key.case, key.candidate, key.metric)
            database.execute("INSERT OR IGNORE INTO series (case_name, candidate, metric) VALUES (?, ?, ?)", name)
            database.execute(
                "INSERT INTO points SELECT number, ?, ?, ?, ? FROM series"
                " WHERE (case_name, candidate, metric) = (?, ?, ?)",
                (place, point.value, point.low, point.high, *name),
            )


def _read_view(database: sqlite3.Connection) -> HistoryView:
    runs = database.execute("SELECT record FROM runs ORDER BY place")
    points: dict[SeriesKey, list[Point]] = {}
    rows = database.execute(
        "SELECT case_name, candidate, metric, run, value, low, high FROM points"
        " JOIN series ON series.number = points.series ORDER BY series, run"
    )
    names: dict[tuple[str, str, str], SeriesKey] = {}
    for case, candidate, metric, *values in rows:
        name = (case, candidate, metric)
        if name not in names:
            names[name] = SeriesKey(case=case, candidate=candidate, metric=Metric(metric))
        points.setdefault(names[name], []).append(Point(*values))
    damaged = database.execute("SELECT line_number, reason FROM damaged ORDER BY line_number")
    return HistoryView(
        tuple(RunRecord.model_validate_json(record) for (record,) in runs),
        {key: tuple(each) for key, each in points.items()},
        tuple(DamagedLine(*row) for row in damaged),
    )
