"""Children: values, errors and progress cross; noise, crashes, time-outs and the parent's death do no harm."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from sdopt import errors, isolation, progress
from sdopt.errors import MissingHardware, SdoptError, UnsafeInputError
from sdopt.isolation import JsonTable, kill_children, run_isolated


def run(name: str, arguments: JsonTable | None = None, **options: float | int) -> isolation.Outcome:
    return run_isolated(f"tests.unit.test_isolation:{name}", arguments or {}, **options)  # type: ignore[arg-type]


# What the children run.


def echo(arguments: JsonTable) -> JsonTable:
    return arguments


def raise_by_name(arguments: JsonTable) -> NoReturn:
    raise getattr(errors, arguments["kind"])("what failed\nin two lines", hint="do this")


def divide(arguments: JsonTable) -> JsonTable:
    return {"value": 1 / arguments["by"]}


def die(arguments: JsonTable) -> JsonTable:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), arguments["signal"])
    return {}


def leave(arguments: JsonTable) -> NoReturn:
    os._exit(arguments["code"])


def crash(_: JsonTable) -> JsonTable:
    ctypes.string_at(0)
    return {}


def sleep(_: JsonTable) -> JsonTable:
    print(os.getpid(), flush=True)
    time.sleep(120)
    return {}


def shout(_: JsonTable) -> JsonTable:
    print('{"value": "forged", "peak_rss_bytes": 0}')
    os.write(1, b'{"error": "forged"}\n\xff\xfe\n')
    subprocess.run(["echo", '{"value": "forged by a grandchild"}'], check=True)
    return {"value": "true"}


def report(_: JsonTable) -> JsonTable:
    for share in (0.0, 0.5, 1.0):
        progress.update("counting …", share)
    return {}


def allocate(arguments: JsonTable) -> JsonTable:
    return {"length": len(bytes(1) * arguments["bytes"])}


def allocate_tensor(arguments: JsonTable) -> JsonTable:
    import torch

    return {"length": torch.ones(arguments["bytes"], dtype=torch.uint8).numel()}


def return_what_is_no_json(_: JsonTable) -> JsonTable:
    return {"path": Path()}


def die_in_the_middle_of_a_message(_: JsonTable) -> JsonTable:
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("pipe:"):
            os.write(descriptor, b'{"value": {"x"')
            os.kill(os.getpid(), signal.SIGKILL)
    return {}


def read_environment(arguments: JsonTable) -> JsonTable:
    return {"value": os.environ.get(arguments["name"])}


# The tests.


def test_tables_cross_unchanged() -> None:
    table = {"text": "é\n\x1b[31m", "number": 0.1, "list": [None, True, {"a": "b" * 3_000_000}]}
    outcome = run("echo", table)
    assert outcome.value == table
    assert 5e6 < outcome.peak_rss_bytes < 2e9
    assert outcome.wall_ns > 0


KINDS = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SdoptError)]


@pytest.mark.parametrize("kind", ["SdoptError", "ParityError", "UnsafeInputError", "MissingDependency"])
def test_errors_cross_with_class_message_and_hint(kind: str) -> None:
    with pytest.raises(getattr(errors, kind)) as caught:
        run("raise_by_name", {"kind": kind})
    assert type(caught.value) is getattr(errors, kind)
    assert (caught.value.message, caught.value.hint) == ("what failed\nin two lines", "do this")


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_error_is_rebuilt_from_its_name(kind: str) -> None:
    rebuilt = isolation._rebuild_error("x:y", {"error": kind, "message": "m", "hint": "h"})
    assert (type(rebuilt).__name__, rebuilt.message, rebuilt.hint) == (kind, "m", "h")


@pytest.mark.parametrize("forged", ["annotations", "print", "SdoptError.mro", "__builtins__", ""])
def test_no_other_name_is_called(forged: str) -> None:
    assert type(isolation._rebuild_error("x:y", {"error": forged, "message": "m", "hint": ""})) is SdoptError


def test_any_other_exception_names_the_function_and_shows_the_traceback() -> None:
    with pytest.raises(SdoptError, match="test_isolation:divide failed") as caught:
        run("divide", {"by": 0})
    assert "ZeroDivisionError" in caught.value.message


@pytest.mark.parametrize("target", ["no_such_module:f", "tests.unit.test_isolation:no_such_function"])
def test_a_target_that_is_not_there_is_an_error(target: str) -> None:
    with pytest.raises(SdoptError, match=target):
        run_isolated(target, {})


def test_a_result_that_is_no_json_is_an_error() -> None:
    with pytest.raises(SdoptError, match="not JSON serializable"):
        run("return_what_is_no_json")


def test_a_death_by_signal_is_named_with_the_last_words() -> None:
    with pytest.raises(SdoptError, match=r"(?s)SIGTERM.*last words"):
        run("die", {"signal": signal.SIGTERM})


def test_a_crash_stays_outside() -> None:
    with pytest.raises(SdoptError, match="SIGSEGV"):
        run("crash")


@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_without_an_answer_is_an_error(code: int) -> None:
    with pytest.raises(SdoptError, match=f"exit code {code}"):
        run("leave", {"code": code})


@pytest.mark.parametrize("name", ["die", "die_in_the_middle_of_a_message"])
def test_a_kill_is_taken_for_lack_of_memory(name: str) -> None:
    with pytest.raises(MissingHardware, match="memory"):
        run(name, {"signal": signal.SIGKILL})


def test_a_time_out_ends_the_child() -> None:
    with pytest.raises(SdoptError, match="did not finish"):
        run("sleep", timeout_s=1.0)
    assert not isolation._live


@pytest.mark.parametrize("name", ["allocate", "allocate_tensor"])
def test_a_memory_limit_holds_and_is_named(name: str) -> None:
    with pytest.raises(MissingHardware, match="ran out of memory"):
        run(name, {"bytes": 60 << 30}, memory_limit_bytes=40 << 30)


def test_noise_on_stdout_does_not_break_the_conversation() -> None:
    assert run("shout").value == {"value": "true"}


def test_progress_crosses() -> None:
    seen: list[tuple[str, float]] = []
    with progress.shown_by(lambda text, share: seen.append((text, share))):
        run("report")
    assert seen == [("counting …", 0.0), ("counting …", 0.5), ("counting …", 1.0)]


def test_the_environment_is_added_to() -> None:
    outcome = run_isolated(
        "tests.unit.test_isolation:read_environment", {"name": "SDOPT_TEST"}, environment={"SDOPT_TEST": "1"}
    )
    assert outcome.value == {"value": "1"}


def test_peak_memory_is_the_childs_own() -> None:
    ballast = bytes(1) * (300 << 20)
    small, large = run("echo"), run("allocate", {"bytes": 200 << 20})
    assert small.peak_rss_bytes < 150 << 20, "what the parent holds is not the child's"
    assert 150 << 20 < large.peak_rss_bytes - small.peak_rss_bytes < 300 << 20
    del ballast


def test_a_parent_that_gives_up_ends_its_children() -> None:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            run("sleep")
        except SdoptError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not isolation._live:
        time.sleep(0.01)
    kill_children()
    thread.join(30)
    assert not thread.is_alive()
    assert len(caught) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = "from sdopt.isolation import run_isolated; run_isolated('tests.unit.test_isolation:sleep', {})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (child := children.read_text().strip()):
        assert parent.poll() is None
        time.sleep(0.01)
    while b"sdopt.isolation" not in Path(f"/proc/{child}/cmdline").read_bytes():
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while is_running(int(child)):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_errors_survive_a_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UnsafeInputError("m", hint="h")))
    assert (type(error), error.message, error.hint) == (UnsafeInputError, "m", "h")
