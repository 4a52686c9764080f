"""The command line's edges: exit codes, JSON errors, messages that cannot harm a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import onnx
import pytest

import sdopt.convert.convert
import sdopt.convert.decide
from sdopt import errors
from sdopt._version import __version__
from sdopt.cli import main as main_module
from sdopt.cli.text import neutralise
from sdopt.errors import SdoptError
from sdopt.processes.channel import rebuild_error

Run = Callable[..., tuple[int, str, str]]

EXIT_CODES = {
    "SdoptError": 1, "CheckpointError": 1, "ArtifactError": 1, "CalibrationError": 1, "DrawingError": 1,
    "ExportError": 1, "BackendError": 1, "AdapterError": 1,
    "UsageError": 2, "RecipeError": 2, "ShapeError": 2,
    "GateError": 3, "ParityError": 3, "AuditError": 3, "FidelityError": 3,
    "UnsafeInputError": 4,
    "EnvironmentMissingError": 5, "MissingDependency": 5, "MissingHardware": 5,
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdopt", *words])
        with pytest.raises(SystemExit) as stopped:
            main_module.main()
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return call


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `sdopt doctor` raise."""

    def plant(error: BaseException) -> None:
        def fail() -> NoReturn:
            raise error

        monkeypatch.setattr("sdopt.backends.probes.probe_all", fail)

    return plant


def test_every_error_is_in_the_table() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SdoptError)}
    assert kinds == EXIT_CODES.keys()
    drawn = [line.replace("│", " ").split()[-5:] for line in (errors.__doc__ or "").splitlines() if "─" in line]
    assert len(drawn) == len(kinds) - 1, "the tree in the docstring shows each of them"


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_every_error_has_its_exit_code(kind: str, run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(getattr(errors, kind)("it broke", hint="mend it"))
    assert run("doctor") == (EXIT_CODES[kind], "", "error: it broke\nmend it\n")


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_with_json_the_error_is_on_stdout_too(kind: str, run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(getattr(errors, kind)("it broke", hint="mend it"))
    code, out, err = run("doctor", "--json")
    assert code == EXIT_CODES[kind]
    assert json.loads(out) == {"error": {"kind": kind, "message": "it broke", "hint": "mend it"}}
    assert "it broke" in err


@pytest.mark.parametrize("traced", [False, True])
def test_the_stack_trace_of_a_child_is_shown_only_where_it_is_asked_for(
    run: Run, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    monkeypatch.setenv("SDOPT_TRACE", "1" if traced else "")
    trace = "Traceback (most recent call last):\n  in the child"
    failing(rebuild_error("room:draw", {"error": "ValueError", "message": "two\nlines", "trace": trace}))
    code, _, err = run("doctor")
    assert code == 1
    assert "error: sdopt did not expect this in room:draw: ValueError: two lines\n" in err
    assert "SDOPT_TRACE=1" in err
    assert ("in the child" in err) == traced


def test_an_interruption_is_130_and_says_how_to_go_on(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    code, out, err = run("doctor", "--json")
    assert (code, out) == (130, "")
    assert "run the same command again to continue" in err


@pytest.mark.parametrize("words", [("convrt",), ("doctor", "--jsn"), ("check",), ("convert", "x", "--batch", "two")])
def test_what_cannot_be_parsed_is_a_usage_error(words: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert words[-1] in err or "FOLDER" in err
    assert "Traceback" not in err


def test_what_cannot_be_parsed_is_json_with_json(run: Run) -> None:
    code, out, _ = run("check", "--json")
    assert code == 2
    assert json.loads(out)["error"]["kind"] == "UsageError"


def test_version_and_help(run: Run) -> None:
    assert __version__ in run("--version")[1]
    for words in (("--help",), ("-h",)):
        code, out, _ = run(*words)
        assert code == 0
        assert all(command in out for command in main_module._COMMANDS)


@pytest.mark.parametrize("command", main_module._COMMANDS)
def test_every_command_of_the_table_is_there(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"sdopt {command}" in out


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202eevil\r\b\udcff"


def test_control_characters_do_not_reach_the_terminal(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(SdoptError(f"cannot read {HOSTILE}", hint=f"move {HOSTILE}"))
    code, out, err = run("doctor", "--json")
    assert code == 1
    for text in (out, err):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "evil" in text
    assert json.loads(out)["error"]["message"] == f"cannot read {HOSTILE}"


def test_neutral_text_keeps_what_can_be_read() -> None:
    assert neutralise("größe 図\nline — “two”") == "größe 図\nline — “two”"
    assert set(neutralise(HOSTILE)) & set("\x1b\x07\u009b\u202e\r\b\udcff") == set()


def test_a_hostile_name_is_inspected_without_harm(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x[").mkdir()
    file = tmp_path / "x[" / "bold]\x1b[2J\u202e.onnx"  # with its folder it reads as the end of a style
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], HOSTILE[:-1], [], [])), file)
    code, _, err = run("inspect", str(file))
    assert code == 0
    assert "[/bold]" in err.replace("\n", "")  # folded at the width of the terminal
    assert not set(err) & set(HOSTILE[:-1].replace("evil", "").replace("owned", "")) - set("[];0123Jm")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("convert",), 2, "no SOURCE"),
        (("convert", "{none}", "-o", "{out}"), 1, "none"),
        (("convert", "{empty}", "-o", "{out}"), 1, "empty"),
        (("convert", "{empty}", "--batch", "0"), 2, "batch"),
        (("convert", "{empty}", "--precision", "fp31"), 2, "'fp32'"),
        (("convert", "{empty}", "--target", "cpuu"), 2, "'cpu'"),
        (("convert", "{empty}", "--size", "64"), 2, "size"),
        (("convert", "{empty}", "--recipe", "{none}"), 2, "cannot read the recipe"),
        (("check", "{none}"), 1, "not an sdopt bundle"),
        (("check", "{empty}"), 1, "not an sdopt bundle"),
        (("inspect", "{empty}"), 1, "empty"),
    ],
)
def test_bad_requests_say_what_is_wrong_before_any_work(
    words: tuple[str, ...], code: int, said: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {name: str(tmp_path / name) for name in ("none", "empty", "out")}
    got, out, err = run(*(word.format(**places) for word in words))
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_cannot_be_saved_is_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        recipe = sdopt.convert.decide.BuildRecipe(source="x")

    def fail(*_: Any) -> NoReturn:
        pytest.fail("work was begun")

    monkeypatch.setattr(sdopt.convert.decide, "open_plan", lambda _: Plan())
    monkeypatch.setattr(sdopt.convert.convert, "convert", fail)
    code, _, err = run("convert", "x", "--save-recipe", str(tmp_path / "none" / "r.toml"))
    assert code == 1
    assert "cannot write" in err


def test_what_nobody_foresaw_is_a_sentence_and_the_way_to_its_trace(
    run: Run, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(ZeroDivisionError("float division\nby zero"))
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert err == (
        "error: sdopt did not expect this: ZeroDivisionError: float division by zero\n"
        "please report it, with what this shows: SDOPT_TRACE=1 sdopt doctor\n"
    )
    failing(AssertionError())
    assert run("doctor", "--json")[2].startswith("error: sdopt did not expect this: AssertionError\n")
    monkeypatch.setenv("SDOPT_TRACE", "1")
    with pytest.raises(AssertionError):
        main_module.main()
