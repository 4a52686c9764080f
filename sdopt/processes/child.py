"""The child's side: limits, the call, its answer. `python -m sdopt.processes.child module:function` is a fresh one.

The child dies with its parent, also when the parent is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import traceback
import typing
from typing import IO, TYPE_CHECKING

from sdopt import progress
from sdopt.errors import SdoptError
from sdopt.processes.channel import JsonTable, send

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_PR_SET_PDEATHSIG = 1
# How the allocators of torch, ONNX Runtime, OpenVINO, CUDA and the dynamic linker say it, in exceptions of their own.
_OUT_OF_MEMORY = (
    "allocate memory", "bad_alloc", "bad allocation", "failed to map segment", "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def die_with_parent(parent_pid: int) -> bool:
    """Ask for a SIGKILL when the parent dies. False where it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return os.getppid() == parent_pid
    return True


def limit_memory(limit_bytes: int) -> None:
    """Bound the address space of this process; 0 leaves it as it is."""
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def open_channel() -> IO[str]:
    """Libraries print to stdout, so the conversation keeps a descriptor of its own and stdout becomes stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def answer(target: str, arguments: object, channel: IO[str]) -> JsonTable:
    """Call `module:function` and return the last message: its value or its error. Progress is sent as it comes.

    A parameter and a result that are annotated with other types than a JSON table are read and written by them.
    """
    module, _, name = target.partition(":")
    try:
        with progress.shown_by(lambda text, share: send(channel, {"progress": [text, share]})):
            function = getattr(importlib.import_module(module), name)
            value = call_with_json(function, arguments)
    except SdoptError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            return {
                "error": "MissingHardware",
                "message": f"{target} ran out of memory",
                "hint": "close other programs, or choose a smaller --size or --batch",
            }
        return {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    return {"value": value, "peak_rss_bytes": peak_rss_bytes()}


def call_with_json(function: typing.Any, arguments: object) -> object:
    """Call a function of one parameter, whose value and result cross as JSON."""
    types = annotations_of(function)
    job = arguments if types.job is None else types.job.validate_python(arguments)
    value = function(job)
    if types.result is None:
        json.dumps(value)  # raises here, with the function's own traceback, and not where it is sent
        return value
    return types.result.dump_python(value, mode="json")


class CallTypes(typing.NamedTuple):
    """How the job and the result of a function cross; None for one that is a JSON table already."""

    job: TypeAdapter[typing.Any] | None
    result: TypeAdapter[typing.Any] | None


def annotations_of(function: typing.Any) -> CallTypes:
    """From the annotations of the function's one parameter and its result."""
    hints = typing.get_type_hints(function)
    result = hints.pop("return", JsonTable)
    (job,) = hints.values() or (JsonTable,)
    plain = (JsonTable, typing.NoReturn, typing.Any)
    if job in plain and result in plain:  # a sandbox need not load a library for it
        return CallTypes(None, None)
    from pydantic import TypeAdapter

    return CallTypes(None if job in plain else TypeAdapter(job), None if result in plain else TypeAdapter(result))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process; in a forked one it begins with the pages that it shares.

    On Linux from VmHWM: ru_maxrss also counts what the parent held when it started this process.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _serve(target: str, parent_pid: int, memory_limit_bytes: int) -> int:
    # Ctrl-C reaches the whole terminal group: the parent decides, and the child dies with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not die_with_parent(parent_pid):
        return 1
    limit_memory(memory_limit_bytes)
    with open_channel() as channel:
        send(channel, answer(target, json.load(sys.stdin), channel))
    return 0


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
