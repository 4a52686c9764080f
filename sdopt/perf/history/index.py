"""The history's points in an SQLite file beside it, so that years of nights are shown without reading every sample.

Nothing is only here: the file is made anew from the history whenever it is missing, damaged, of another version, or not
of this history. Where it cannot be written, it is made in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdopt.disk.locks import lock_open_file
from sdopt.errors import ArtifactError
from sdopt.perf.history.history import DamagedLine, History, gather_lines, parse_lines
from sdopt.perf.history.record import Metric, RunRecord, SeriesKey
from sdopt.perf.history.view import HistoryView, Point, list_points, without_samples

# Of the tables below, and of what a point is.
_VERSION = 1
_CHUNK_BYTES = 4 << 20
# Another process writes it, or this one may not: such a file is somebody's, and is left as it is.
_NOT_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
}  # fmt: skip
_TABLES = """
CREATE TABLE source (lines INTEGER, bytes INTEGER, digest TEXT, stamp TEXT);
CREATE TABLE runs (place INTEGER PRIMARY KEY, id TEXT UNIQUE, created_utc TEXT, kind TEXT, suite_digest TEXT,
                   commit_hash TEXT, fingerprint TEXT, verdict TEXT, record TEXT);
CREATE TABLE series (number INTEGER PRIMARY KEY, case_name TEXT, candidate TEXT, metric TEXT,
                     UNIQUE (case_name, candidate, metric));
CREATE TABLE points (series INTEGER, run INTEGER, value REAL, low REAL, high REAL, PRIMARY KEY (series, run))
    WITHOUT ROWID;
CREATE TABLE damaged (line_number INTEGER, reason TEXT);
"""


def index_path(history: History) -> Path:
    return history.path.with_name(history.path.name + ".sqlite")


def view_indexed(history: History) -> HistoryView:
    """What `view_history(history.read())` gives, from the index, which is brought up to date first.

    Raises `ArtifactError` for a history that cannot be read or was written by a newer sdopt.
    """
    try:
        with history.path.open("rb") as file:
            lock_open_file(file.fileno(), shared=True)
            return _view_file(file, history)
    except FileNotFoundError:
        return HistoryView()
    except OSError as error:
        raise ArtifactError(f"cannot read {history.path}: {error.strerror}") from error


def _view_file(file: BinaryIO, history: History) -> HistoryView:
    path = index_path(history)
    # A file that is damaged or of another history is found by the first, thrown away, and made by the second.
    for _ in range(2):
        try:
            return _view_database(path, file, history)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_DAMAGE:
                break
            with contextlib.suppress(OSError):
                path.unlink()
    return _view_database(None, file, history)


def _view_database(place: Path | None, file: BinaryIO, history: History) -> HistoryView:
    """None is in memory."""
    with contextlib.closing(_connect(place)) as database:
        _update(database, file, history.path)
        return _read_view(database)


def _connect(path: Path | None) -> sqlite3.Connection:
    database = sqlite3.connect(path or ":memory:", isolation_level=None)
    try:
        if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


@dataclass(frozen=True)
class _Source:
    """The part of the history that is in the index."""

    lines: int = 0
    size_bytes: int = 0
    digest: str = ""
    stamp: str = ""


def _update(database: sqlite3.Connection, file: BinaryIO, path: Path) -> None:
    stamp = _stamp(file)
    if (known := _read_source(database)) is not None and known.stamp == stamp:
        return
    with _transaction(database):
        known = _read_source(database)
        if known is None:
            known = _Source()
            for statement in (*_TABLES.split(";")[:-1], f"PRAGMA user_version = {_VERSION}"):
                database.execute(statement)
        elif not _continues(file, known):
            raise sqlite3.DatabaseError("the index of another history")
        file.seek(known.size_bytes)
        lines = list(parse_lines(file, path, known.lines + 1))
        _add_lines(database, lines, known.lines)
        size_bytes = file.tell()
        source = (known.lines + len(lines), size_bytes, _digest(file, size_bytes), stamp)
        database.execute("DELETE FROM source")
        database.execute("INSERT INTO source VALUES (?, ?, ?, ?)", source)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _read_source(database: sqlite3.Connection) -> _Source | None:
    """None for a new file. Raises `sqlite3.DatabaseError` for one of another version."""
    if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return None
    row = database.execute("SELECT lines, bytes, digest, stamp FROM source").fetchone()
    if row is None or database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
        raise sqlite3.DatabaseError("an index of another version")
    return _Source(*row)


def _continues(file: BinaryIO, known: _Source) -> bool:
    """Whether the file begins with the very bytes that are indexed, and these end with a whole line."""
    if os.fstat(file.fileno()).st_size < known.size_bytes:
        return False
    if known.size_bytes:
        file.seek(known.size_bytes - 1)
        if file.read(1) != b"\n":
            return False
    return _digest(file, known.size_bytes) == known.digest


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
