"""SQLite files that hold nothing of their own: what is in them can be made again from something else.

So a file that is missing, damaged, of another version or of something else is made anew; where it cannot be written,
the same is made in memory.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# Another process writes it, or this one may not: such a file is somebody's, and is left as it is.
_NOT_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
}  # fmt: skip
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Schema:
    """`statements` fill a new file, each of them ended by a semicolon.

    `version` is raised with every change of them or of what the tables mean: a file of another one is made anew.
    """

    version: int
    statements: str


def use_database(path: Path, schema: Schema, use: Callable[[sqlite3.Connection], _Result]) -> _Result:
    """What `use` returns, given the database at `path` in autocommit mode, which is closed afterwards.

    `use` raises `sqlite3.DatabaseError` for contents that are not what they should be. It is then called again with a
    new file, and, where that fails or the file is in use by another process or cannot be written, with a new database
    in memory.
    """
    for _ in range(2):
        try:
            with contextlib.closing(_open(path, schema)) as database:
                return use(database)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_DAMAGE:
                break
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.closing(_open(":memory:", schema)) as database:
        return use(database)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside or nothing, while no other process writes."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _open(place: Path | str, schema: Schema) -> sqlite3.Connection:
    database = sqlite3.connect(place, isolation_level=None)
    try:
        if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        if _is_new(database):
            with transaction(database):
                if _is_new(database):  # another process may have come before
                    for statement in (*schema.statements.split(";")[:-1], f"PRAGMA user_version = {schema.version}"):
                        database.execute(statement)
        if database.execute("PRAGMA user_version").fetchone() != (schema.version,):
            raise sqlite3.DatabaseError("of another version")
    except BaseException:
        database.close()
        raise
    return database


def _is_new(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master").fetchone() is None
