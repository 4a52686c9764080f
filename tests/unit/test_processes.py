"""Children: values, errors and progress cross; noise, crashes, time-outs and the parent's death do no harm."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sdopt import errors, progress
from sdopt.errors import MissingHardware, SdoptError, UnsafeInputError
from sdopt.model.component import ComponentName
from sdopt.processes import warm
from sdopt.processes.call import How, Outcome, call, call_by_name
from sdopt.processes.channel import JsonTable, rebuild_error
from sdopt.processes.nursery import current_nursery, own_nursery, submit_in_context
from sdopt.processes.zygote import CANNOT_FORK, spoils_cuda

HOWS = pytest.mark.parametrize("how", [How.FRESH, How.WARM])


def run(name: str, arguments: JsonTable | None = None, how: How = How.WARM, **options: Any) -> Outcome[Any]:
    return call_by_name(f"tests.unit.test_processes:{name}", arguments or {}, how=how, **options)


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


def wait_for_file(arguments: JsonTable) -> JsonTable:
    progress.update(f"{arguments['name']} waits", 0.0)
    while not Path(arguments["file"]).exists():
        time.sleep(0.01)
    return {"name": arguments["name"]}


def note_pid_and_sleep(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(120)


def ask_torch(_: JsonTable) -> JsonTable:
    import torch

    # Of a process that was forked: threads of torch's own begin only with its first computation.
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return {"cuda": torch.cuda.is_initialized(), "threads_before": len(names) - 1}


def compute_everywhere(_: JsonTable) -> JsonTable:
    """Differences from numpy, and 1 + 10 and 2 + 20 by the two runtimes."""
    import numpy as np
    import onnx
    import onnxruntime
    import openvino
    import torch
    from onnx import TensorProto, helper

    a = torch.arange(360_000.0).reshape(600, 600) % 7
    product = float((a @ a - torch.from_numpy(a.numpy().astype(np.float64) @ a.numpy()).float()).abs().max())
    image = torch.ones(1, 1, 64, 64)
    conv = float((torch.nn.functional.conv2d(image, torch.ones(1, 1, 3, 3)) - 9).abs().max())
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xyz")
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "add", [x, y], [z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data = model.SerializeToString()
    onnx.checker.check_model(model)
    feeds = {"x": np.array([1, 2], np.float32), "y": np.array([10, 20], np.float32)}
    (ort,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
    core = openvino.Core()
    ov = core.compile_model(core.read_model(data), "CPU")(feeds)[0]
    return {"torch": product, "conv": conv, "onnxruntime": ort.tolist(), "openvino": ov.tolist()}


def where(_: JsonTable) -> JsonTable:
    command = Path("/proc/self/cmdline").read_bytes()
    return {"folder": os.getcwd(), "forked": b"sdopt.processes.zygote" in command}


# The tests.


@HOWS
def test_tables_cross_unchanged(how: How) -> None:
    table = {"text": "é\n\x1b[31m", "number": 0.1, "list": [None, True, {"a": "b" * 3_000_000}]}
    outcome = run("echo", table, how=how)
    assert outcome.value == table
    assert 5e6 < outcome.peak_rss_bytes < 2e9
    assert outcome.wall_ns > 0


KINDS = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SdoptError)]


@HOWS
@pytest.mark.parametrize("kind", ["SdoptError", "ParityError", "UnsafeInputError", "MissingDependency"])
def test_errors_cross_with_class_message_and_hint(kind: str, how: How) -> None:
    with pytest.raises(getattr(errors, kind)) as caught:
        run("raise_by_name", {"kind": kind}, how=how)
    assert type(caught.value) is getattr(errors, kind)
    assert (caught.value.message, caught.value.hint) == ("what failed\nin two lines", "do this")


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_error_is_rebuilt_from_its_name(kind: str) -> None:
    rebuilt = rebuild_error("x:y", {"error": kind, "message": "m", "hint": "h"})
    assert (type(rebuilt).__name__, rebuilt.message, rebuilt.hint) == (kind, "m", "h")


@pytest.mark.parametrize("forged", ["annotations", "print", "SdoptError.mro", "__builtins__", ""])
def test_no_other_name_is_called(forged: str) -> None:
    assert type(rebuild_error("x:y", {"error": forged, "message": "m", "hint": ""})) is SdoptError


@HOWS
def test_any_other_exception_is_one_sentence_with_the_traceback_as_a_note(how: How) -> None:
    with pytest.raises(SdoptError) as caught:
        run("divide", {"by": 0}, how=how)
    assert caught.value.message == (
        "sdopt did not expect this in tests.unit.test_processes:divide: ZeroDivisionError: division by zero"
    )
    (note,) = caught.value.__notes__
    assert note.startswith("Traceback")
    assert "1 / arguments" in note


@HOWS
@pytest.mark.parametrize("target", ["no_such_module:f", "tests.unit.test_processes:no_such_function"])
def test_a_target_that_is_not_there_is_an_error(target: str, how: How) -> None:
    with pytest.raises(SdoptError, match=target):
        call_by_name(target, {}, how=how)


@HOWS
def test_a_result_that_is_no_json_is_an_error(how: How) -> None:
    with pytest.raises(SdoptError, match="not JSON serializable"):
        run("return_what_is_no_json", how=how)


@HOWS
def test_a_death_by_signal_is_named_with_the_last_words(how: How) -> None:
    with pytest.raises(SdoptError, match=r"(?s)SIGTERM.*last words"):
        run("die", {"signal": signal.SIGTERM}, how=how)


@HOWS
def test_a_crash_stays_outside(how: How) -> None:
    with pytest.raises(SdoptError, match="SIGSEGV"):
        run("crash", how=how)


@HOWS
@pytest.mark.parametrize("code", [0, 7])
def test_an_exit_without_an_answer_is_an_error(code: int, how: How) -> None:
    with pytest.raises(SdoptError, match=f"exit code {code}"):
        run("leave", {"code": code}, how=how)


@HOWS
@pytest.mark.parametrize("name", ["die", "die_in_the_middle_of_a_message"])
def test_a_kill_is_taken_for_lack_of_memory(name: str, how: How) -> None:
    with pytest.raises(MissingHardware, match="memory"):
        run(name, {"signal": signal.SIGKILL}, how=how)


@HOWS
def test_a_time_out_ends_the_child(how: How) -> None:
    with pytest.raises(SdoptError, match="did not finish"):
        run("sleep", timeout_s=1.0, how=how)
    assert not len(current_nursery())


@HOWS
@pytest.mark.parametrize("name", ["allocate", "allocate_tensor"])
def test_a_memory_limit_holds_and_is_named(name: str, how: How) -> None:
    with pytest.raises(MissingHardware, match="ran out of memory"):
        run(name, {"bytes": 60 << 30}, memory_limit_bytes=40 << 30, how=how)


@HOWS
def test_noise_on_stdout_does_not_break_the_conversation(how: How) -> None:
    assert run("shout", how=how).value == {"value": "true"}


@HOWS
def test_progress_crosses(how: How) -> None:
    seen: list[tuple[str, float]] = []
    with progress.shown_by(lambda text, share: seen.append((text, share))):
        run("report", how=how)
    assert seen == [("counting …", 0.0), ("counting …", 0.5), ("counting …", 1.0)]


def test_the_environment_is_added_to() -> None:
    outcome = call_by_name(
        "tests.unit.test_processes:read_environment", {"name": "SDOPT_TEST"}, environment={"SDOPT_TEST": "1"}
    )
    assert outcome.value == {"value": "1"}


def test_peak_memory_is_the_childs_own() -> None:
    ballast = bytes(1) * (300 << 20)
    small, large = run("echo", how=How.FRESH), run("allocate", {"bytes": 200 << 20}, how=How.FRESH)
    assert small.peak_rss_bytes < 150 << 20, "what the parent holds is not the child's"
    assert 150 << 20 < large.peak_rss_bytes - small.peak_rss_bytes < 300 << 20
    del ballast


@HOWS
def test_a_job_that_gives_up_ends_its_own_children_alone(how: How, tmp_path: Path) -> None:
    """Two jobs in two threads of one process: one fails, and the other's child, and its progress, live on."""
    ended: dict[str, str] = {}
    seen: dict[str, list[str]] = {"fails": [], "lives": []}
    started = {name: threading.Event() for name in seen}
    go_on = tmp_path / "go-on"

    def work(name: str) -> None:
        def note(text: str, share: float) -> None:
            seen[name].append(text)
            started[name].set()

        with progress.shown_by(note):
            try:
                with own_nursery(), ThreadPoolExecutor(1) as pool:
                    job = {"name": name, "file": str(go_on)}
                    future = submit_in_context(pool, run, "wait_for_file", job, how)
                    if name == "fails":
                        assert started[name].wait(60)
                        current_nursery().kill()
                    ended[name] = future.result().value["name"]
            except SdoptError as error:
                ended[name] = type(error).__name__

    threads = [threading.Thread(target=work, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    assert started["lives"].wait(60)
    threads[0].join(60)
    assert ended == {"fails": "MissingHardware"}
    go_on.touch()
    threads[1].join(60)
    assert ended["lives"] == "lives"
    assert seen == {"fails": ["fails waits"], "lives": ["lives waits"]}


def test_a_job_that_fails_takes_its_children_along() -> None:
    caught: list[SdoptError] = []

    def wait() -> None:
        try:
            run("sleep")
        except SdoptError as error:
            caught.append(error)

    def interrupt(pool: ThreadPoolExecutor) -> None:
        with own_nursery() as nursery:
            submit_in_context(pool, wait)
            while not len(nursery):
                time.sleep(0.01)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        interrupt(pool)
    assert len(caught) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@HOWS
def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path, how: How) -> None:
    noted = tmp_path / "pid"
    code = (
        "from sdopt.processes.call import How, call_by_name; "
        f"call_by_name('tests.unit.test_processes:note_pid_and_sleep', {str(noted)!r}, how=How.{how.name})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not (noted.exists() and noted.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    child, its_parent = map(int, noted.read_text().split())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while is_running(child) or (how is How.WARM and is_running(its_parent)):
        assert time.monotonic() < deadline, "the child or the zygote outlived its parent"
        time.sleep(0.02)


def test_a_zygote_that_was_killed_is_replaced_and_says_that_its_child_is_gone() -> None:
    zygote = warm.warm_zygote()
    assert zygote is not None
    errors_seen: list[SdoptError] = []

    def wait() -> None:
        try:
            run("sleep")
        except SdoptError as error:
            errors_seen.append(error)

    with ThreadPoolExecutor(1) as pool, own_nursery() as nursery:
        waiting = submit_in_context(pool, wait)
        while not len(nursery):
            time.sleep(0.01)
        zygote._process.kill()
        waiting.result(60)
    assert [type(error) for error in errors_seen] == [MissingHardware]
    assert run("echo", {"a": 1}).value == {"a": 1}
    assert warm.warm_zygote() is not zygote


def test_the_zygote_only_imports() -> None:
    """More threads than OpenBLAS's pools would not live through the fork; CUDA must not have been touched."""
    run("echo")
    zygote = warm.warm_zygote()
    assert zygote is not None
    threads = [Path(task, "comm").read_text().strip() for task in Path(f"/proc/{zygote._process.pid}/task").iterdir()]
    assert len(threads) <= 1 + 2 * (os.cpu_count() or 1), threads
    assert run("ask_torch").value == {"cuda": False, "threads_before": 0}


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_zygote_learns_whether_its_children_may_use_the_gpu(spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: spoilt)
    assert spoils_cuda() == spoilt


def test_where_forked_children_could_not_use_the_gpu_all_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    class Spoilt(warm.Zygote):
        """A zygote that finds, once it has imported, that CUDA was asked for its devices."""

        def __init__(self) -> None:
            started.append(self)
            self._process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({CANNOT_FORK})"])
            self._process.wait()

        def close(self) -> None: ...

        def fits(self) -> bool:
            return True

        def start(self, stderr: object) -> warm.WarmChild:  # type: ignore[override]
            raise EOFError

    monkeypatch.setattr(warm, "_zygote", None)
    monkeypatch.setattr(warm, "_spoils_cuda", False)
    monkeypatch.setattr(warm, "Zygote", Spoilt)
    for _ in range(2):
        assert not run("where").value["forked"]
    assert len(started) == 1
    assert not warm.can_fork_warm()


def test_what_is_computed_after_the_fork_is_right() -> None:
    value = run("compute_everywhere").value
    assert value["torch"] == value["conv"] == 0.0
    assert value["onnxruntime"] == value["openvino"] == [11.0, 22.0]


def test_a_warm_child_sees_the_surroundings_of_its_parent_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("echo")
    monkeypatch.setenv("SDOPT_TEST_NOW", "later")
    assert run("read_environment", {"name": "SDOPT_TEST_NOW"}).value == {"value": "later"}
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.chdir(tmp_path)
    assert run("where").value["folder"] == str(tmp_path)
    assert run("where", folder="/").value["folder"] == "/"


def test_settings_that_libraries_read_when_imported_make_a_child_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("where").value["forked"]
    assert not call_by_name("tests.unit.test_processes:where", {}, how=How.WARM, environment={"X": "1"}).value["forked"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert not run("where").value["forked"]
    monkeypatch.undo()
    assert run("where").value["forked"]


def test_many_threads_ask_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda number: run("echo", {"number": number}).value["number"], range(24)))
    assert values == list(range(24))


@dataclass(frozen=True)
class Order:
    name: ComponentName
    path: Path
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    path: Path
    total: int


def fulfil(order: Order) -> Receipt:
    assert isinstance(order.name, ComponentName)
    return Receipt(order.path / order.name, sum(order.sizes))


@HOWS
def test_a_job_and_a_result_cross_by_their_annotations(how: How) -> None:
    here = importlib.import_module("tests.unit.test_processes")  # by the name that a child imports
    receipt = call(here.fulfil, here.Order(ComponentName.UNET, Path("/a"), (1, 2)), how=how).value
    assert receipt == here.Receipt(Path("/a/unet"), 3)


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
