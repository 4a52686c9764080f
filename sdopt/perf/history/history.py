"""The history: a file of JSON Lines that is only ever appended to, a line for each run.

The order of lines is the order of nights. Ids and times only identify: a clock that steps back changes no order. A line
that cannot be read is reported with its number and passed over; nothing of the file is ever changed or deleted.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from sdopt.disk.files import disk_errors, fsync_folder
from sdopt.disk.locks import lock_open_file
from sdopt.errors import ArtifactError, UsageError
from sdopt.perf.history.record import SCHEMA_VERSION, RunRecord

LINE_LIMIT_BYTES = 32 << 20
"""A night of a hundred series with a thousand samples each has a twentieth of it."""


@dataclass(frozen=True)
class DamagedLine:
    """A line of the file that is not a run: cut, damaged, or of a format that is not known."""

    line_number: int
    reason: str


@dataclass(frozen=True)
class HistoryContents:
    """What a history holds, in the order of its lines."""

    records: tuple[RunRecord, ...] = ()
    damaged: tuple[DamagedLine, ...] = ()


class History:
    """The file at `path`, which the first append makes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: RunRecord) -> None:
        """Add a run, in one write under the file's lock. After it the line is on the disk.

        What a crash left of another line stays as it is, on a line of its own. Raises `MissingHardware` on a full disk,
        which leaves the file as it was.
        """
        line = record.model_dump_json().encode() + b"\n"
        if len(line) > LINE_LIMIT_BYTES:
            raise ArtifactError(
                f"the run {record.id} takes {len(line)} bytes, and a line has at most {LINE_LIMIT_BYTES}"
            )
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                lock_open_file(descriptor)
                _append_line(descriptor, line)
            finally:
                os.close(descriptor)
            fsync_folder(self.path.parent)

    def read(self) -> HistoryContents:
        """All runs; none where there is no file yet.

        Raises `ArtifactError` where a line was written by a newer sdopt: what is left out could be the last good run.
        """
        try:
            with self.path.open("rb") as file:
                lock_open_file(file.fileno(), shared=True)
                return gather_lines(parse_lines(file, self.path))
        except FileNotFoundError:
            return HistoryContents()
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror}") from error


def new_run_id(now: datetime) -> str:
    """`20260102T030405Z-` and eight hex digits that no other run has. `now` carries its time zone."""
    if now.tzinfo is None:
        raise ValueError("a run's time needs its time zone")
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def find_run(records: Sequence[RunRecord], wanted: str) -> RunRecord:
    """The run whose id starts with `wanted`, or `last`. Raises `UsageError` for none and for several."""
    if wanted == "last" and records:
        return records[-1]
    found = [record for record in records if wanted and record.id.startswith(wanted)]
    if len(found) != 1:
        many = f"{len(found)} runs" if found else "no run"
        raise UsageError(
            f"{many} of the history has an id that starts with {wanted!r}", hint="sdopt perf history lists them"
        )
    return found[0]


def parse_lines(file: BinaryIO, path: Path, first_number: int = 1) -> Iterator[RunRecord | DamagedLine]:
    """Lines from the file's position on, each a run or what is wrong with it. `path` is for messages."""
    for number, line in enumerate(_split_lines(file), first_number):
        if line is None:
            yield DamagedLine(number, f"longer than {LINE_LIMIT_BYTES} bytes")
        else:
            yield _parse_line(line, number, path)


def gather_lines(
    lines: Iterable[RunRecord | DamagedLine], first_number: int = 1, known: Collection[str] = ()
) -> HistoryContents:
    """Runs apart from damage; the second line with an id is damage, as two merged copies of a history leave it.

    `known` are ids of lines before these.
    """
    records: dict[str, RunRecord] = {}
    damaged = []
    for number, line in enumerate(lines, first_number):
        if isinstance(line, DamagedLine):
            damaged.append(line)
        elif line.id in records or line.id in known:
            damaged.append(DamagedLine(number, f"the run {line.id} a second time"))
        else:
            records[line.id] = line
    return HistoryContents(tuple(records.values()), tuple(damaged))


def _append_line(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full, which only a second write says
            os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _split_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines without their end; None for one that is too long."""
    while line := file.readline(LINE_LIMIT_BYTES):
        if line.endswith(b"\n") or len(line) < LINE_LIMIT_BYTES:
            yield line.rstrip(b"\n")
            continue
        while (rest := file.readline(LINE_LIMIT_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parse_line(line: bytes, number: int, path: Path) -> RunRecord | DamagedLine:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DamagedLine(number, f"no JSON: {error}" if line else "empty")
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: line {number} has schema {version}, and this sdopt reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade sdopt",
        )
    try:
        return RunRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        return DamagedLine(number, f"{'.'.join(map(str, first['loc'])) or 'run'}: {first['msg']}")
