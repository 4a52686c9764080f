"""Trees of other commits: what is measured is that commit's code, and the search finds the commit that it should."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import sdopt
from sdopt.errors import SdoptError, UsageError
from sdopt.perf.gate.bisect import Bisection, Judgement, Tried, search
from sdopt.perf.night.worktree import Tree, checked_out, find_own_tree, list_commits, require_tree
from sdopt.perf.once import PROTOCOL

ANSWER = """
from pathlib import Path
import sdopt
def answer(arguments):
    return {"place": str(Path(sdopt.__file__).resolve().parent.parent), "value": VALUE}
"""


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of a package `sdopt` whose `perf.once` answers 1 and 2; processes and errors are the real ones.

    In the older one the child's entry is where it was once: `sdopt.isolation`.
    """
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "repository"
    package, real = root / "sdopt", Path(sdopt.__file__).parent
    (package / "perf").mkdir(parents=True)
    processes = [f"processes/{path.name}" for path in (real / "processes").glob("*.py")]
    (package / "processes").mkdir()
    for name in ("__init__.py", "_version.py", "errors.py", "progress.py", "perf/__init__.py", *processes):
        (package / name).write_bytes((real / name).read_bytes())
    git(tmp_path, "init", "--quiet", "-b", "main", str(root))
    (package / "processes" / "child.py").rename(package / "isolation.py")
    for value in (1, 2):
        if value == 2:
            (package / "isolation.py").rename(package / "processes" / "child.py")
        (package / "perf" / "once.py").write_text(ANSWER.replace("VALUE", str(value)))
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", f"answers {value}")
    return root


def test_each_tree_answers_with_its_own_code(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the current folder holds another sdopt, and the environment an installed one."""
    monkeypatch.chdir(repository)
    old, new = list_commits(repository, "main~1", "main")
    with checked_out(repository, old) as before, checked_out(repository, new) as after:
        answers = [tree.call("answer", {}, tmp_path / "store") for tree in (before, after)]
        assert [answer["value"] for answer in answers] == [1, 2]
        assert [answer["place"] for answer in answers] == [str(before.root), str(after.root)]
        assert (before.commit, after.commit) == (old, new)
        place = before.root
    assert not place.exists()
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_process_of_another_tree_refuses(tmp_path: Path) -> None:
    require_tree({"tree": str(find_own_tree().root)})
    with pytest.raises(SdoptError, match="was to be measured"):
        require_tree({"tree": str(tmp_path)})
    # A folder without a package: what answers is the installed one, and it sees that it was not asked.
    arguments = {"protocol": PROTOCOL, "source": "", "recipe": {}, "output": str(tmp_path / "o")}
    with pytest.raises(SdoptError, match="was to be measured"):
        Tree(tmp_path).call("build", arguments, tmp_path / "store")


def test_a_protocol_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SdoptError, match="protocol"):
        find_own_tree().call("build", {"protocol": PROTOCOL + 1}, tmp_path / "store")


def test_the_worktree_goes_when_its_use_fails(repository: Path) -> None:
    def fail() -> None:
        with checked_out(repository, "main"):
            raise SdoptError("planted")

    with pytest.raises(SdoptError, match="planted"):
        fail()
    assert git(repository, "worktree", "list").count("\n") == 0


def test_what_is_no_commit_and_no_way_is_refused(repository: Path) -> None:
    with pytest.raises(UsageError, match="no commit"), checked_out(repository, "--force"):
        pass
    for good, bad in (("main", "main~1"), ("main", "main")):
        with pytest.raises(UsageError, match="not an earlier commit"):
            list_commits(repository, good, bad)


def test_an_installed_package_in_somebodys_repository_has_no_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = repository / "venv" / "sdopt" / "__init__.py"
    monkeypatch.setattr(sdopt, "__file__", str(installed))
    assert find_own_tree() == Tree(repository / "venv")
    monkeypatch.setattr(sdopt, "__file__", str(repository / "sdopt" / "__init__.py"))
    assert find_own_tree() == Tree(repository, git(repository, "rev-parse", "HEAD"))
    (repository / "new").write_text("x")
    assert find_own_tree().changed


COMMITS = [f"{number:040x}" for number in range(20)]


def judge_by(first_bad: int, broken: set[int], calls: list[int]) -> Callable[[str], Tried]:
    def judge(commit: str) -> Tried:
        place = COMMITS.index(commit)
        calls.append(place)
        if place in broken:
            return Tried(commit, Judgement.BROKEN, message="does not build")
        return Tried(commit, Judgement.BAD if place >= first_bad else Judgement.GOOD, 0.05)

    return judge


def run_search(first_bad: int, broken: set[int]) -> tuple[Bisection, list[int]]:
    calls: list[int] = []
    return search(COMMITS, judge_by(first_bad, broken, calls)), calls


@pytest.mark.parametrize("first_bad", range(1, 20))
def test_the_search_finds_the_first_bad_commit(first_bad: int) -> None:
    found, calls = run_search(first_bad, set())
    assert found.first_bad == COMMITS[first_bad]
    assert found.good == COMMITS[first_bad - 1]
    assert len(calls) <= 6  # the last, and log2 of those between
    assert len(calls) == len(set(calls)), "a commit was measured twice"


@pytest.mark.parametrize("first_bad", range(1, 19))
@pytest.mark.parametrize("broken", [{9}, {1}, {9, 10}, {3, 12}, set(range(1, 19))], ids=str)
def test_broken_commits_are_passed_over_and_the_range_is_no_wider_than_they_are(
    first_bad: int, broken: set[int]
) -> None:
    found, calls = run_search(first_bad, broken)
    places = [COMMITS.index(commit) for commit in found.suspects]
    assert places == list(range(places[0], places[-1] + 1))
    assert COMMITS.index(found.good) == places[0] - 1
    assert first_bad in places
    assert set(places[:-1]) <= broken, "only what is broken may be left open"
    named = {tried.commit for tried in found.tried if tried.judgement is Judgement.BROKEN}
    assert {COMMITS[place] for place in set(calls) & broken} == named


def test_an_end_that_is_not_bad_is_said() -> None:
    for first_bad, broken, said in ((99, set(), "no difference"), (5, {19}, "does not build")):
        with pytest.raises(SdoptError, match=said):
            search(COMMITS, judge_by(first_bad, broken, []))
