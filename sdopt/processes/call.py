"""Run a function in another process, so that memory does not add up and a crash stays outside.

Warm children are forked from a process that has imported torch and diffusers once; fresh ones are for what must be
alone: sandboxes, measured processes, plan builds, another commit's code. Jobs, results, errors and progress cross as
JSON lines, never as pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import IO, Any, Generic, Protocol, TypeVar

from sdopt import progress
from sdopt.errors import SdoptError
from sdopt.processes.channel import JsonTable, describe_death, read_message, rebuild_error
from sdopt.processes.child import annotations_of
from sdopt.processes.nursery import current_nursery
from sdopt.processes.warm import can_fork_warm, warm_zygote, write_request

J = TypeVar("J")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class How(Enum):
    WARM = "warm"
    """Forked from the zygote; on other systems than Linux, and with an environment of its own, it is fresh."""
    FRESH = "fresh"


@dataclass(frozen=True)
class Outcome(Generic[R_co]):
    """What a child returned, its peak resident memory and its wall time from start to end."""

    value: R_co
    peak_rss_bytes: int
    wall_ns: int


def call(
    function: Callable[[J], R],
    job: J,
    *,
    how: How = How.WARM,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> Outcome[R]:
    """Call a function of a module with its one parameter in another process.

    The job and the result cross by the annotations of the function. An `SdoptError` of the child is raised here as it
    is; any other exception, a time-out or a death by signal becomes one that names the function. The child's own output
    is shown only when it fails. `folder` is where it runs; a fresh child looks there first for what it imports.
    """
    types = annotations_of(function)
    target = f"{function.__module__}:{function.__qualname__}"
    table = job if types.job is None else types.job.dump_python(job, mode="json")
    outcome = call_by_name(
        target, table, how=how, timeout_s=timeout_s, memory_limit_bytes=memory_limit_bytes, environment=environment,
        folder=folder,
    )  # fmt: skip
    value = outcome.value if types.result is None else types.result.validate_python(outcome.value)
    return Outcome(value, outcome.peak_rss_bytes, outcome.wall_ns)


def call_by_name(
    target: str,
    arguments: object,
    *,
    how: How = How.FRESH,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    entry: str = "sdopt.processes.child",
) -> Outcome[Any]:
    """Like `call`, for a function that this process cannot import, or should not: `module:function`.

    `entry` is the module that a fresh child starts in: that of an older commit has another name.
    """
    command = [sys.executable, "-m", entry, target, str(os.getpid()), str(memory_limit_bytes or 0)]
    start = _start_fresh(command, arguments, target, environment, folder)
    if how is How.WARM and not environment and can_fork_warm():
        start = _start_warm(target, arguments, memory_limit_bytes or 0, folder, otherwise=start)
    return _run(start, name=target, timeout_s=timeout_s)


def call_program(
    command: Sequence[str], arguments: JsonTable, *, name: str, timeout_s: float | None = None
) -> Outcome[Any]:
    """Run a program that speaks as a child does: a JSON table on stdin, JSON lines on stdout (`processes.channel`).

    Raises as `call`, naming it `name`.
    """
    return _run(_start_fresh(command, arguments, name, None, None), name=name, timeout_s=timeout_s)


class _Process(Protocol):
    """A child whose request has been written; `returncode` is as in `subprocess`."""

    returncode: int | None

    def kill(self) -> None: ...
    def wait(self) -> int: ...


@dataclass(frozen=True)
class _Started:
    process: _Process
    stdin: IO[str]
    stdout: IO[str]
    write: Callable[[], None]


def _start_fresh(
    command: Sequence[str], arguments: object, name: str, environment: Mapping[str, str] | None, folder: str | None
) -> Callable[[IO[str]], _Started]:
    def start(stderr: IO[str]) -> _Started:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
                errors="replace", env={**os.environ, **(environment or {})}, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            raise SdoptError(f"{name} cannot be started: {error}") from error
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None
        assert stdout is not None

        def write() -> None:
            json.dump(arguments, stdin)
            stdin.close()

        return _Started(child, stdin, stdout, write)

    return start


def _start_warm(
    target: str, arguments: object, memory_limit_bytes: int, folder: str | None,
    *, otherwise: Callable[[IO[str]], _Started],
) -> Callable[[IO[str]], _Started]:  # fmt: skip
    def start(stderr: IO[str]) -> _Started:
        for _ in range(2):  # a zygote that was killed between two calls is replaced
            zygote = warm_zygote()
            if zygote is None:
                break
            try:
                child = zygote.start(stderr)
            except (EOFError, OSError):
                continue
            write = partial(write_request, child.stdin, target, arguments, memory_limit_bytes, folder)
            return _Started(child, child.stdin, child.stdout, write)
        return otherwise(stderr)  # it says why, where importing ends the zygote

    return start


def _run(start: Callable[[IO[str]], _Started], *, name: str, timeout_s: float | None) -> Outcome[Any]:
    start_ns = time.monotonic_ns()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        started = start(stderr)
        with current_nursery().looks_after(started.process):
            try:
                message = _converse(started, timeout_s, name)
            finally:
                _end(started)
        if message is None:
            stderr.seek(0)
            raise describe_death(name, started.process.returncode or 0, stderr.read())
    if "error" in message:
        raise rebuild_error(name, message)
    return Outcome(message["value"], message["peak_rss_bytes"], time.monotonic_ns() - start_ns)


def _converse(child: _Started, timeout_s: float | None, name: str) -> JsonTable | None:
    """Send the request, pass progress on, and return the last message, or None where the child died."""
    timed_out = threading.Event()
    timer = None
    if timeout_s is not None:

        def stop() -> None:
            timed_out.set()
            child.process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            child.write()
        for line in child.stdout:
            if not line.endswith("\n"):
                break  # it died in the middle of a message
            message = read_message(line, name)
            if "progress" in message:
                progress.update(*message["progress"])
            else:
                child.process.wait()
                return message
    finally:
        if timer is not None:
            timer.cancel()
    child.process.wait()
    if timed_out.is_set():
        raise SdoptError(f"{name} did not finish in the time it was given")
    return None


def _end(child: _Started) -> None:
    if child.process.returncode is None:
        child.process.kill()
        child.process.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
