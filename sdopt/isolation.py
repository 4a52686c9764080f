"""Run a function in a fresh Python process, so that memory does not add up and a crash stays outside.

Arguments, results, errors and progress cross as JSON lines, never as pickles. The child dies with its parent, also when
the parent is killed. `python -m sdopt.isolation module:function` is the child's entry.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import sdopt.errors
from sdopt import progress
from sdopt.errors import MissingHardware, SdoptError

_PR_SET_PDEATHSIG = 1
_STDERR_SHOWN_CHARS = 4000
# How the allocators of torch, ONNX Runtime, OpenVINO, CUDA and the dynamic linker say it, in exceptions of their own.
_OUT_OF_MEMORY = (
    "allocate memory", "bad_alloc", "bad allocation", "failed to map segment", "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip

JsonTable = dict[str, Any]

_live: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Outcome:
    """What a child returned, its peak resident memory and its wall time from start to end."""

    value: JsonTable
    peak_rss_bytes: int
    wall_ns: int


def run_isolated(
    target: str,
    arguments: JsonTable,
    *,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> Outcome:
    """Call `module:function` with one JSON table in a fresh process; it returns a JSON table.

    An `SdoptError` of the child is raised here as it is; any other exception, a time-out or a death by signal becomes
    one that names the function. The child's own output is shown only when it fails. `folder` is where it runs; Python
    looks there first for what it imports.
    """
    command = [sys.executable, "-m", "sdopt.isolation", target, str(os.getpid()), str(memory_limit_bytes or 0)]
    return run_child(command, arguments, name=target, timeout_s=timeout_s, environment=environment, folder=folder)


def run_child(
    command: Sequence[str],
    arguments: JsonTable,
    *,
    name: str,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> Outcome:
    """Run a program that speaks as a child does: one JSON table on stdin, JSON lines on stdout.

    Lines are `{"progress": [text, share]}`, then `{"value": …, "peak_rss_bytes": …}` or `{"error": …, "message": …,
    "hint": …}` with the name of a class of `sdopt.errors` or nothing. Raises as `run_isolated`, naming it `name`.
    """
    start_ns = time.monotonic_ns()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
                errors="replace", env={**os.environ, **(environment or {})}, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            raise SdoptError(f"{name} cannot be started: {error}") from error
        _live.add(child)
        try:
            message = _converse(child, arguments, None if timeout_s is None else time.monotonic() + timeout_s, name)
        finally:
            _live.discard(child)
            _end(child)
        if message is None:
            stderr.seek(0)
            raise _death(name, child.returncode, stderr.read())
    if "error" in message:
        raise _rebuild_error(name, message)
    return Outcome(message["value"], message["peak_rss_bytes"], time.monotonic_ns() - start_ns)


def kill_children() -> None:
    """End every child that runs now; the threads that wait for one get an error. For a parent that gives up."""
    for child in list(_live):
        child.kill()


def _converse(
    child: subprocess.Popen[str], arguments: JsonTable, deadline: float | None, target: str
) -> JsonTable | None:
    """Send the arguments, pass progress on, and return the last message, or None where the child died."""
    import threading

    assert child.stdin is not None
    assert child.stdout is not None
    timed_out = threading.Event()
    timer = None
    if deadline is not None:

        def stop() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(deadline - time.monotonic(), stop)
        timer.daemon = True
        timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            json.dump(arguments, child.stdin)
            child.stdin.close()
        for line in child.stdout:
            if not line.endswith("\n"):
                break  # it died in the middle of a message
            message = _read_message(line, target)
            if "progress" in message:
                progress.update(*message["progress"])
            else:
                child.wait()
                return dict(message)
    finally:
        if timer is not None:
            timer.cancel()
    child.wait()
    if timed_out.is_set():
        raise SdoptError(f"{target} did not finish in the time it was given")
    return None


def _read_message(line: str, target: str) -> JsonTable:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    kinds = ({"progress"}, {"value", "peak_rss_bytes"}, {"error", "message", "hint"})
    if not isinstance(message, dict) or message.keys() not in kinds:
        raise SdoptError(f"{target} answered with something else than a message: {line.strip()[:200]!r}")
    return message


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _death(target: str, returncode: int, stderr: str) -> SdoptError:
    if returncode == -signal.SIGKILL:
        return MissingHardware(
            f"{target} was killed, most likely for lack of memory",
            hint="close other programs, or choose a smaller --size or --batch",
        )
    how = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    return SdoptError(f"{target} ended with {how}\n{stderr[-_STDERR_SHOWN_CHARS:]}")


def _rebuild_error(target: str, message: JsonTable) -> SdoptError:
    kind = getattr(sdopt.errors, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, SdoptError):
        return kind(message["message"], hint=message["hint"])
    return SdoptError(f"{target} failed: {message['message']}")


def _serve(target: str, parent_pid: int, memory_limit_bytes: int) -> int:
    # Ctrl-C reaches the whole terminal group: the parent decides, and the child dies with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            return 1
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    # Libraries print to stdout; the conversation keeps a descriptor of its own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with channel:
        _send(channel, _call(target, json.load(sys.stdin), channel))
    return 0


def _call(target: str, arguments: JsonTable, channel: IO[str]) -> JsonTable:
    module, _, name = target.partition(":")
    try:
        with progress.shown_by(lambda text, share: _send(channel, {"progress": [text, share]})):
            value = getattr(importlib.import_module(module), name)(arguments)
    except SdoptError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            return {
                "error": "MissingHardware",
                "message": f"{target} ran out of memory",
                "hint": "close other programs, or choose a smaller --size or --batch",
            }
        return {"error": "", "message": traceback.format_exc(), "hint": ""}
    return {"value": value, "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    On Linux from VmHWM: ru_maxrss also counts what the parent held when it started this process.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _send(channel: IO[str], message: JsonTable) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
