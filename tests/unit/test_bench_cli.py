"""`sdopt bench` on the command line: its options, its outputs, its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sdopt.bench import run as run_module
from sdopt.bench.report import BenchReport, Status, read_report
from sdopt.bench.run import BenchRequest, BenchResult
from sdopt.cli.bench import bench
from sdopt.errors import ArtifactError, UsageError
from tests.planted_reports import make_report, make_result


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
    assert [baseline.value for baseline in request.against] == ["compile"]


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


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--steps", "0"], ["--time-limit", "0"], ["--color"]])
def test_impossible_options_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    result, requests = invoke(monkeypatch, "out/b", *arguments)
    assert result.exit_code == 2
    assert requests == []


def test_an_unknown_baseline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = invoke(monkeypatch, "out/b", "--against", "eager,compile")
    assert isinstance(result.exception, UsageError)
    assert "'eager'" in result.exception.message
    assert requests == []


def test_a_report_that_cannot_be_written_fails_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result, requests = invoke(monkeypatch, "out/b", "--report", str(tmp_path / "file"))
    assert isinstance(result.exception, UsageError)
    assert requests == []


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [str(tmp_path)])
    assert isinstance(result.exception, ArtifactError)
    assert "is no sdopt bundle" in result.exception.message


def test_it_has_at_most_eight_options() -> None:
    assert sum(parameter.param_type_name == "option" for parameter in bench.params) <= 8
