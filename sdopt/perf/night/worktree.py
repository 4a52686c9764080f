"""A tree of sdopt's code, the running one or that of another commit, and work that is done with it.

A child of a tree must import sdopt from that tree: an editable install or the current folder may lead it elsewhere, and
an A/B of a tree with itself finds no difference. So each child is told its tree, runs in it, and checks where it is.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sdopt
from sdopt.disk.store import cache_root
from sdopt.errors import SdoptError, UsageError
from sdopt.processes.call import call_by_name
from sdopt.processes.channel import JsonTable


@dataclass(frozen=True)
class Tree:
    """The folder that holds the package `sdopt`, and its commit; empty where it is in no repository."""

    root: Path
    commit: str = ""
    changed: bool = False
    """Whether its files differ from the commit."""

    def call(self, target: str, arguments: JsonTable, cache: Path, timeout_s: float | None = None) -> JsonTable:
        """Call a function of `sdopt.perf.once` in a process of this tree; `cache` is its SDOPT_CACHE.

        Raises what the function raises, and `SdoptError` where another tree answers.
        """
        environment = {"PYTHONPATH": str(self.root), "SDOPT_CACHE": str(cache)}
        values = {**arguments, "tree": str(self.root)}
        outcome = call_by_name(
            f"sdopt.perf.once:{target}", values, timeout_s=timeout_s, environment=environment, folder=str(self.root),
            entry=self._find_entry(),
        )  # fmt: skip
        return dict(outcome.value)

    def _find_entry(self) -> str:
        """The module that a child of this tree starts in; commits before `sdopt.processes` have another one."""
        before = (self.root / "sdopt" / "isolation.py").is_file()
        return "sdopt.isolation" if before else "sdopt.processes.child"


def require_tree(arguments: JsonTable) -> None:
    """Raise `SdoptError` in a process whose sdopt is not that of the tree it was told."""
    root, package = Path(arguments["tree"]).resolve(), Path(sdopt.__file__).resolve().parent
    if package.parent != root:
        raise SdoptError(f"sdopt was imported from {package.parent}, and {root} was to be measured")


def find_own_tree() -> Tree:
    """The tree of the code that runs now."""
    root = Path(sdopt.__file__).resolve().parent.parent
    try:
        # An installed package may lie inside of somebody's repository, which is not its own.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return Tree(root)
        return Tree(root, _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain")))
    except SdoptError:
        return Tree(root)


@contextlib.contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[Tree]:
    """A worktree of a commit in the cache folder, removed at the end. Raises `SdoptError` for an unknown commit."""
    commit = find_commit(repository, commit)
    place = cache_root() / "worktrees"
    place.mkdir(parents=True, exist_ok=True)
    _git(repository, "worktree", "prune")  # of what a killed run left
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{commit[:12]}-") as folder:
        root = (Path(folder) / "tree").resolve()
        _git(repository, "worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            yield Tree(root, commit)
        finally:
            _git(repository, "worktree", "remove", "--force", str(root))


def find_commit(repository: Path, name: str) -> str:
    """The full hash that a branch, a tag or a short hash names. Raises `UsageError` where there is none."""
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except SdoptError as error:
        raise UsageError(f"there is no commit {name!r} in {repository}", hint="git log shows those that are") from error


def list_commits(repository: Path, good: str, bad: str) -> list[str]:
    """Full hashes from `good` to `bad`, both among them, along first parents and oldest first.

    Raises `UsageError` where `good` is not on that way.
    """
    good, bad = find_commit(repository, good), find_commit(repository, bad)
    way = _git(repository, "rev-list", "--first-parent", "--reverse", bad).split()
    if good not in way or good == bad:
        raise UsageError(
            f"{good[:12]} is not an earlier commit on the way of first parents to {bad[:12]}",
            hint="give the good commit first: sdopt perf bisect GOOD..BAD",
        )
    return way[way.index(good) :]


def describe_commit(repository: Path, commit: str) -> str:
    """Short hash and subject."""
    return _git(repository, "log", "-1", "--format=%h %s", commit)


def _git(folder: Path, *words: str) -> str:
    git = shutil.which("git")
    if git is None:
        raise SdoptError("git is not installed", hint="on Debian: apt-get install git")
    done = subprocess.run([git, "-C", str(folder), *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SdoptError(f"git {words[0]} failed in {folder}: {done.stderr.strip()}")
    return done.stdout.strip()
