"""The A/B of the same night: suspects are measured again in two trees, process by process in turns.

Each tree builds its own bundle with its own code; then A B, B A, A B, … so that what drifts falls on both alike.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import progress
from sdopt.bench.case.report import ProcessRecord
from sdopt.bench.case.suite import Suite
from sdopt.bench.case.suites import SuiteRun, expand
from sdopt.bench.measure.conditions import list_condition_problems
from sdopt.bench.measure.process_environment import measure_conditions, read_cpu_use
from sdopt.errors import SdoptError
from sdopt.perf.gate.confirm_rules import Confirmation
from sdopt.perf.history.record import Metric, SeriesKey
from sdopt.perf.night.nightly import Bundle, build_bundle
from sdopt.perf.night.series import group_samples, merge_conditions
from sdopt.perf.night.worktree import Tree, checked_out
from sdopt.perf.once import PROTOCOL, dump_job

# Fewer pairs of processes say nothing: the rules want two groups a side.
_LEAST_PAIRS = 2
# As many as there is time for, never by what the first ones said. Six tell 3 % where processes differ by 0.7 %; those
# of a small network differ more.
MOST_PAIRS = 16


@dataclass(frozen=True)
class Side:
    """A tree and the bundle that it built."""

    tree: Tree
    bundle: Bundle

    def measure(self, job: SuiteRun, candidate: str) -> ProcessRecord:
        """One fresh process. Raises `SdoptError` where it fails."""
        arguments = {
            "protocol": PROTOCOL, "folder": str(self.bundle.folder), "job": dump_job(job), "candidate": candidate,
        }  # fmt: skip
        values = self.tree.call("measure", arguments, self.bundle.store)
        return ProcessRecord.model_validate(values["process"])


@dataclass(frozen=True)
class Pairs:
    """Processes of both sides in the order in which they ran, and why their times are not to be believed."""

    baseline: tuple[ProcessRecord, ...]
    candidate: tuple[ProcessRecord, ...]
    dirty: tuple[str, ...] = ()

    def confirm(self, metric: Metric) -> Confirmation | None:
        """None for a metric that processes do not have."""
        sides = [dict(group_samples(processes)).get(metric) for processes in (self.baseline, self.candidate)]
        if sides[0] is None or sides[1] is None:
            return None
        old, new = ([[round(sample) for sample in group] for group in groups or ()] for groups in sides)
        return Confirmation(old, new, self.dirty)


@contextlib.contextmanager
def opened_side(tree: Tree, job: SuiteRun) -> Iterator[Side]:
    """A tree with its own bundle of the job's case, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sdopt-side-") as folder:
        progress.update(f"{job.case.name}: building {tree.commit[:12]}", 0.0)
        yield Side(tree, build_bundle(tree, job.case, Path(folder), job.method.time_limit_s))


def measure_pairs(
    baseline: Side, candidate: Side, job: SuiteRun, name: str, *, count: int, deadline_s: float | None = None
) -> Pairs | None:
    """`count` processes of each side in turns. None where `deadline_s` of `time.monotonic` leaves no time for two.

    The deadline is kept by the time that pairs took so far. Raises what a process raises.
    """
    before, start_s = read_cpu_use(), time.monotonic()
    done: tuple[list[ProcessRecord], list[ProcessRecord]] = ([], [])
    for pair in range(count):
        spent_s = time.monotonic() - start_s
        wanted = max(1, _LEAST_PAIRS - pair)
        if deadline_s is not None and time.monotonic() + wanted * spent_s / max(1, pair) > deadline_s:
            break
        progress.update(f"A/B of {job.name}/{name}", pair / count)
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            done[side].append((baseline, candidate)[side].measure(job, name))
    if len(done[0]) < _LEAST_PAIRS:
        return None
    whole = merge_conditions([measure_conditions(before), *(p.conditions for side in done for p in side)])
    return Pairs(tuple(done[0]), tuple(done[1]), list_condition_problems(whole))


def share_time(names: Sequence[str], deadline_s: float) -> Iterator[tuple[str, float]]:
    """Each with its own deadline of `time.monotonic`: what is left is divided by those that are left."""
    for index, name in enumerate(names):
        now_s = time.monotonic()
        yield name, now_s + (deadline_s - now_s) / (len(names) - index)


@dataclass
class SameNight:
    """What the gate asks for confirmation. `obstacle` says why it could not give one, for the report."""

    suite: Suite
    own: Tree
    good_commit: str
    budget_s: float
    obstacle: str = ""

    def __call__(self, keys: Sequence[SeriesKey]) -> Mapping[SeriesKey, Confirmation] | None:
        """Suspects measured again, in their order until the time is spent; None where the old commit cannot run."""
        deadline_s = time.monotonic() + self.budget_s
        jobs = {job.name: job for job in expand(self.suite)}
        found: dict[SeriesKey, Confirmation] = {}
        try:
            with checked_out(self.own.root, self.good_commit) as good:
                for case, until_s in share_time(list(dict.fromkeys(key.case for key in keys)), deadline_s):
                    if time.monotonic() < until_s:
                        wanted = [key for key in keys if key.case == case]
                        found |= self._measure_case(good, jobs[case], wanted, until_s)
        except SdoptError as error:
            self.obstacle = f"no A/B against {self.good_commit[:12]}: {error.message}"
        if not found and not self.obstacle:
            self.obstacle = f"no A/B against {self.good_commit[:12]}: {self.budget_s:.0f} s were too little"
        return found or None

    def _measure_case(
        self, good: Tree, job: SuiteRun, keys: Sequence[SeriesKey], deadline_s: float
    ) -> dict[SeriesKey, Confirmation]:
        found: dict[SeriesKey, Confirmation] = {}
        with opened_side(good, job) as baseline, opened_side(self.own, job) as candidate:
            for name, until_s in share_time(list(dict.fromkeys(key.candidate for key in keys)), deadline_s):
                pairs = measure_pairs(baseline, candidate, job, name, count=MOST_PAIRS, deadline_s=until_s)
                if pairs is not None and pairs.dirty and not self.obstacle:
                    self.obstacle = f"the A/B of {job.name}/{name} does not count: {'; '.join(pairs.dirty)}"
                for key in keys if pairs is not None else ():
                    answer = pairs.confirm(key.metric) if pairs is not None and key.candidate == name else None
                    if answer is not None:
                        found[key] = answer
        return found
