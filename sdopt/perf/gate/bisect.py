"""Which commit made it slower: a binary search, each step an interleaved A/B against the good commit.

Commits that cannot be built or measured are passed over and named; where they hide the first bad one, the answer is a
range.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sdopt import progress
from sdopt.bench.case.stats import Speed, judge_pair
from sdopt.bench.case.suites import SuiteRun
from sdopt.errors import SdoptError, UsageError
from sdopt.perf.gate.confirm import MOST_PAIRS, measure_pairs, opened_side
from sdopt.perf.history.record import Metric
from sdopt.perf.night.worktree import checked_out, list_commits

# Of measuring one commit, without its build: slow networks get fewer pairs, not longer nights.
_COMMIT_BUDGET_S = 600


class Judgement(StrEnum):
    GOOD = "good"
    BAD = "bad"
    BROKEN = "broken"


@dataclass(frozen=True)
class Tried:
    """What a commit was found to be; `change` is by how much slower than the good one, null where it is broken.

    `message` says why it is broken, or why its times are not to be believed.
    """

    commit: str
    judgement: Judgement
    change: float | None = None
    message: str = ""


Judge = Callable[[str], Tried]


@dataclass(frozen=True)
class Bisection:
    """`suspects` are the commits of which one is the first bad one, oldest first: one where all could be measured."""

    good: str
    suspects: tuple[str, ...]
    tried: tuple[Tried, ...]

    @property
    def first_bad(self) -> str:
        """Empty where broken commits leave more than one."""
        return self.suspects[0] if len(self.suspects) == 1 else ""


def search(commits: Sequence[str], judge: Judge) -> Bisection:
    """Search `commits`, oldest first: the first is good and the last is bad, which is proven before anything else.

    Raises `SdoptError` where the last is not bad.
    """
    last = judge(commits[-1])
    if last.judgement is not Judgement.BAD:
        detail = last.message or "there is no difference beyond doubt"
        raise SdoptError(
            f"{commits[-1][:12]} cannot be told from {commits[0][:12]} as the bad one: {detail}",
            hint="choose the series that the gate named, or commits further apart",
        )
    tried = {last.commit: last}
    good, bad = 0, len(commits) - 1
    while True:
        open_commits = [i for i in range(good + 1, bad) if commits[i] not in tried]
        if not open_commits:
            return Bisection(commits[good], tuple(commits[good + 1 : bad + 1]), tuple(tried.values()))
        middle = min(open_commits, key=lambda i: abs(2 * i - good - bad))
        found = judge(commits[middle])
        tried[commits[middle]] = found
        if found.judgement is Judgement.BAD:
            bad = middle
        elif found.judgement is Judgement.GOOD:
            good = middle


def bisect(repository: Path, span: str, job: SuiteRun, candidate: str, metric: Metric) -> Bisection:
    """Search `GOOD..BAD` for the commit that made a series slower. Raises `UsageError` for a span that is none."""
    good, dots, bad = span.partition("..")
    if not (good and dots and bad):
        raise UsageError(f"{span!r} is not a span of commits", hint="give it as GOOD..BAD")
    commits = list_commits(repository, good, bad)
    with checked_out(repository, commits[0]) as tree, opened_side(tree, job) as baseline:

        def judge(commit: str) -> Tried:
            progress.update(f"measuring {commit[:12]}", 0.0)
            try:
                with checked_out(repository, commit) as other, opened_side(other, job) as side:
                    until_s = time.monotonic() + _COMMIT_BUDGET_S
                    pairs = measure_pairs(baseline, side, job, candidate, count=MOST_PAIRS, deadline_s=until_s)
            except SdoptError as error:
                return Tried(commit, Judgement.BROKEN, message=error.message)
            if pairs is None:
                message = f"two processes of each commit take longer than {_COMMIT_BUDGET_S / 60:.0f} minutes"
                return Tried(commit, Judgement.BROKEN, message=message)
            answer = pairs.confirm(metric)
            verdict = judge_pair(answer.baseline, answer.candidate) if answer is not None else None
            if verdict is None:
                return Tried(commit, Judgement.BROKEN, message=f"{candidate} has no {metric}")
            judgement = Judgement.BAD if verdict.speed is Speed.SLOWER else Judgement.GOOD
            doubt = f"not to be trusted: {'; '.join(pairs.dirty)}" if pairs.dirty else ""
            return Tried(commit, judgement, 1 / verdict.ratio.value - 1, doubt)

        return search(commits, judge)
