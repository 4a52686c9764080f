"""`sdopt bench` on the command line: its options, its outputs, its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sdopt.bench import run as run_module
from sdopt.bench.case.report import BenchReport, Scope, Status, read_report
from sdopt.bench.page.pairs import judge_pairs
from sdopt.bench.run import BenchRequest, BenchResult
from sdopt.cli.bench import bench
from sdopt.errors import ArtifactError, UsageError
from tests.planted_reports import make_gpu_processes, make_report, make_result


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str, **engines: Any) -> tuple[Result, list[BenchRequest]]:
    requests: list[BenchRequest] = []

    def run(request: BenchRequest, work: Path) -> BenchResult:
        assert work.is_dir()
        requests.append(request)
        return make_result(make_report(**engines))

    monkeypatch.setattr(run_module, "run_bench", run)
    return CliRunner().invoke(bench, list(arguments)), requests


def test_json_is_all_that_stdout_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, "out/b", "--json")
    assert result.exit_code == 0
    assert BenchReport.model_validate_json(result.stdout) == make_report()
    assert "2.43x" in result.stderr
    assert "The pictures agree" in " ".join(result.stderr.split())


def test_without_json_stdout_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = invoke(
        monkeypatch,
        "out/b",
        "--against",
        "compile",
        "--repeats",
        "3",
        "--steps",
        "7",
        "--prompt",
        "a",
        "--prompt",
        "<b>",
    )
    assert result.stdout == ""
    (request,) = requests
    assert (request.folder, request.prompts, request.steps, request.repeats) == (Path("out/b"), ("a", "<b>"), 7, 3)
    assert request.against == ("compile",)


def test_the_report_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "r"
    result, _ = invoke(monkeypatch, "out/b", "--report", str(folder))
    assert result.exit_code == 0
    assert read_report(folder / "report.json") == make_report()
    assert (folder / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert "report.html" in result.stderr


def test_engines_that_fail_are_told_and_exit_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost: dict[str, Any] = {"status": Status.FAILED, "message": "crashed \x1b[31m", "processes": (), "fidelity": ()}
    result, _ = invoke(monkeypatch, "out/b", "--json", "--report", str(tmp_path), **lost)
    assert result.exit_code == 1
    assert BenchReport.model_validate_json(result.stdout).candidates[0].status is Status.FAILED
    assert "crashed" in result.stderr
    assert "\x1b[31m" not in result.stderr
    assert (tmp_path / "report.html").is_file()


def test_an_unknown_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = invoke(monkeypatch, "out/b", "--color")
    assert result.exit_code == 2
    assert requests == []


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--repeats", "0", "--repeats is 0, and has to be a whole number from 1 to 100"),
        ("--steps", "0", "--steps is 0, and has to be a whole number from 1 to 1000"),
        ("--repeats", "101", "--repeats is 101, and has to be a whole number from 1 to 100"),
        ("--time-limit", "nan", "--time-limit is nan, and has to be a number of seconds of 1 or more"),
    ],
)
def test_a_number_out_of_range_is_named_as_generate_does(
    monkeypatch: pytest.MonkeyPatch, flag: str, value: str, message: str
) -> None:
    result, requests = invoke(monkeypatch, "out/b", flag, value)
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == message
    assert requests == []


def test_every_figure_is_whole_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result, _ = invoke(
        monkeypatch, "out/b", label="TensorRT-RTX 1.7 fp16, UNet in int8", processes=make_gpu_processes()
    )
    table = result.stderr.partition("against")[0]
    assert "\N{HORIZONTAL ELLIPSIS}" not in table
    assert "102 ms 25.5 ms 2.43x 3.20 s 500 MB 3.10 GB 45.0" in " ".join(table.split())
    assert all(len(line) <= 80 for line in table.splitlines())


def test_an_unknown_baseline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = invoke(monkeypatch, "out/b", "--against", "eagre,compile")
    assert isinstance(result.exception, UsageError)
    assert "'eagre'" in result.exception.message
    assert requests == []


SUITE = """
name = "mine"
[method]
repeats = 3
picture_budget_s = 0.5
[[cases]]
name = "a"
steps = [2, 4]
against = ["eager-bf16"]
[[cases]]
name = "b"
scope = "unet"
prompts = ["x"]
guidance_scale = 1.5
method = { repeats = 1, most_pictures = 7 }
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    (tmp_path / "s.toml").write_text(SUITE)
    return str(tmp_path / "s.toml")


def test_a_suite_is_a_request_for_each_run(monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    result, requests = invoke(monkeypatch, "out/b", "--suite", suite, "--json")
    assert result.exit_code == 0
    assert [(r.steps, r.repeats, r.against, r.prompts, r.suite) for r in requests] == [
        (2, 3, ("eager-bf16",), (), "mine"), (4, 3, ("eager-bf16",), (), "mine"), (20, 1, None, ("x",), "mine"),
    ]  # fmt: skip
    assert [r.effort.picture_budget_s for r in requests] == [0.5, 0.5, 3.0]
    assert (requests[2].scope, requests[2].guidance_scale, requests[2].effort.most_pictures) == (Scope.UNET, 1.5, 7)
    assert [BenchReport.model_validate(each) for each in json.loads(result.stdout)] == [make_report()] * 3


def test_options_come_before_the_suite(monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    _, requests = invoke(
        monkeypatch, "out/b", "--suite", suite, "--repeats", "9", "--against", "", "--prompt", "p", "--time-limit", "5"
    )
    assert {(r.repeats, r.against, r.prompts, r.time_limit_s) for r in requests} == {(9, (), ("p",), 5.0)}
    assert [r.steps for r in requests] == [2, 4, 20]


def test_a_suite_has_a_report_for_each_run_and_a_page_of_all(
    monkeypatch: pytest.MonkeyPatch, suite: str, tmp_path: Path
) -> None:
    result, _ = invoke(monkeypatch, "out/b", "--suite", suite, "--report", str(tmp_path / "r"))
    assert result.exit_code == 0
    index = (tmp_path / "r" / "index.html").read_text("utf-8")
    for name in ("a-2", "a-4", "b"):
        assert read_report(tmp_path / "r" / name / "report.json") == make_report()
        assert f'href="{name}/report.html"' in index
    assert not (tmp_path / "r" / "report.html").exists()


def test_engines_that_fail_in_one_run_exit_1(monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    lost: dict[str, Any] = {"status": Status.FAILED, "message": "crashed", "processes": (), "fidelity": ()}
    result, requests = invoke(monkeypatch, "out/b", "--suite", suite, "--json", **lost)
    assert (result.exit_code, len(requests)) == (1, 3)
    assert len(json.loads(result.stdout)) == 3


@pytest.mark.parametrize("name", ["smoke", "latency", "fidelity", "nightly"])
def test_suites_that_ship_are_found_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    result, requests = invoke(monkeypatch, "out/b", "--suite", name)
    assert result.exit_code == 0
    assert {r.suite for r in requests} == {name}


PROMPTS = ("<script>alert(1)</script>", "שלום \u202eabc", "a" * 10_000, "--steps", "[bold]x[/]")


def test_any_prompt_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result, requests = invoke(monkeypatch, "out/b", *arguments, "--report", str(tmp_path), "--json")
    assert requests[0].prompts == PROMPTS
    assert result.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "report.json", "report.csv"}


def test_what_the_table_says_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = invoke(monkeypatch, "out/b")
    (pair,) = judge_pairs(make_report())
    assert f"OpenVINO bf16 against torch eager-fp32: {pair.verdict.speed}, " in result.stderr


def test_peer_layers_and_weights_are_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("")
    python = tmp_path / "python"
    _, requests = invoke(monkeypatch, "out/b", "--peer-python", str(python), "--layers", "--weights", f"lpips={python}")
    (request,) = requests
    assert (request.peer_python, request.layers, request.perceptual.lpips) == (python, True, (python,))
    result, requests = invoke(monkeypatch, "out/b", "--peer-python", str(tmp_path / "none"))
    assert (result.exit_code, requests) == (2, [])
    result, requests = invoke(monkeypatch, "out/b", "--weights", "clop=x")
    assert isinstance(result.exception, UsageError)
    assert requests == []


def test_a_report_that_cannot_be_written_fails_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result, requests = invoke(monkeypatch, "out/b", "--report", str(tmp_path / "file"))
    assert isinstance(result.exception, UsageError)
    assert requests == []


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [str(tmp_path)])
    assert isinstance(result.exception, ArtifactError)
    assert "is not an sdopt bundle" in result.exception.message
