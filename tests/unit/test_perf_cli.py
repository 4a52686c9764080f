"""`sdopt perf` as a user has it, on planted histories; and the script that keeps the history on a branch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sdopt.bench.case.suite import Suite, SuiteCase
from sdopt.cli import perf as perf_cli
from sdopt.errors import SdoptError, UsageError
from sdopt.perf.history.history import History
from sdopt.perf.history.record import Metric
from sdopt.perf.night.nightly import Night, digest_suite, write_night
from tests.conftest import REPOSITORY
from tests.planted_runs import make_key, make_nights, make_run

SUITE = Suite(name="planted", cases=(SuiteCase(name="tiny", source="tiny-shapes"),))
SCRIPT = REPOSITORY / ".github" / "actions" / "nightly" / "history"


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "history.jsonl"
    for record in make_nights(3, {make_key(): 100.0}, suite_digest=digest_suite(SUITE)):
        History(path).append(record)
    return path


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(perf_cli.perf, [str(word) for word in words])


def wait_for_gate(history: Path, values: dict[Any, Any], **changes: Any) -> Path:
    record = make_run(3, values, suite_digest=digest_suite(SUITE), verdict="", **changes)
    return write_night(history.parent / "runs", SUITE, Night(record, {}))


def test_the_gate_ends_with_0_or_3_and_one_json_document(history: Path) -> None:
    wait_for_gate(history, {make_key(): 100.0})
    done = call("gate", "--history", history, "--json", "--confirm-minutes", "0")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["findings"] == []
    assert "Nothing to report" in done.stderr

    wait_for_gate(history, {make_key(Metric.LOAD): 1.0}, id="20270101T000000Z-00000000")
    done = call("gate", "--history", history, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["findings"][0]["rule"] == "missing"
    assert len(History(history).read().records) == 5

    done = call("gate", "--history", history, "--accept", "20270101", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["accepted"] == "20270101"


def test_a_gate_with_nothing_to_judge_says_how_to_get_it(history: Path) -> None:
    done = call("gate", "--history", history)
    assert isinstance(done.exception, UsageError)
    assert "sdopt perf run" in done.exception.hint


def test_history_writes_a_page_and_exports(history: Path, tmp_path: Path) -> None:
    done = call("history", "--history", history, "--report", tmp_path / "page", "--export", tmp_path / "e", "--json")
    assert done.exit_code == 0, done.exception
    table = json.loads(done.stdout)
    assert len(table["runs"]) == 3
    assert all(Path(path).is_file() for path in table["written"])
    assert {Path(path).parent.name for path in table["written"]} == {"page", "e"}


def test_compare_is_of_two_runs(history: Path) -> None:
    first, *_, last = History(history).read().records
    done = call("compare", first.id, last.id, "--history", history, "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["same_environment"] is True


@pytest.mark.parametrize(
    ("series", "said"),
    [("tiny", "not a series"), ("tiny/engines/speed", "not a series"), ("none/engines/unet_step", "no case 'none'")],
)
def test_a_series_that_cannot_be_is_refused(series: str, said: str) -> None:
    done = call("bisect", "a..b", "--suite", "smoke", "--series", series)
    assert isinstance(done.exception, UsageError)
    assert said in done.exception.message


def test_a_span_that_is_none_is_refused() -> None:
    done = call("bisect", "main", "--suite", "smoke", "--series", "quick/engines/unet_step")
    assert isinstance(done.exception, SdoptError)
    assert "span" in done.exception.message


def test_machines_share_the_branch_of_histories(tmp_path: Path) -> None:
    """The first makes it, a second that pushed meanwhile loses nothing, and the code's branch stays as it is."""
    origin = tmp_path / "origin.git"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]

    def git(*words: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def keep(command: str, machine: str) -> None:
        words = [str(SCRIPT), command, str(tmp_path / f"history-{machine}"), *([machine] if command == "push" else [])]
        subprocess.run(words, cwd=tmp_path / machine, check=True, capture_output=True)

    git("init", "--quiet", "--bare", "-b", "main", str(origin))
    for machine in ("one", "two"):
        git("clone", "--quiet", str(origin), machine)
        if machine == "one":
            (tmp_path / machine / "code").write_text("x")
            git("add", "code", cwd=tmp_path / machine)
            git("commit", "--quiet", "-m", "code", cwd=tmp_path / machine)
            git("push", "--quiet", "origin", "HEAD:main", cwd=tmp_path / machine)
    for machine in ("one", "two"):
        keep("fetch", machine)
    for machine in ("one", "two"):
        (tmp_path / f"history-{machine}" / machine).mkdir()
        (tmp_path / f"history-{machine}" / machine / "history.jsonl").write_text(f"{machine} 1\n")
        keep("push", machine)
    keep("fetch", "one")
    with (tmp_path / "history-one" / "one" / "history.jsonl").open("a") as file:
        file.write("one 2\n")
    keep("push", "one")
    keep("push", "one")  # nothing new is not a failure
    assert git("--git-dir", str(origin), "ls-tree", "-r", "--name-only", "perf-history").split() == [
        "one/history.jsonl", "two/history.jsonl",
    ]  # fmt: skip
    assert git("--git-dir", str(origin), "show", "perf-history:one/history.jsonl") == "one 1\none 2"
    assert git("--git-dir", str(origin), "ls-tree", "--name-only", "main") == "code"


def test_a_remote_that_does_not_answer_is_no_empty_history(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", str(tmp_path / "gone")], check=True)
    done = subprocess.run([str(SCRIPT), "fetch", str(tmp_path / "h")], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode not in (0, 2)
