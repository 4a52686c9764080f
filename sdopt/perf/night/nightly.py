"""A night: each case of a suite is built and benched by a tree's code, and all of it becomes one `RunRecord`.

    suite -> jobs -> for each case: checkpoint, fresh store, bundle -> for each job: bench report -> series, failures

Each case has a store of its own, empty at first: graphs are kept under their architecture, so a store that outlives a
commit would hand the old code's graphs to the new, and a build from it would take no time. A case that cannot be built
is a failure in the record, and the others go on. The record waits in its folder until the gate has judged it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from sdopt import progress
from sdopt.bench.case.report import BenchReport, Conditions, read_report
from sdopt.bench.case.suite import Suite, SuiteCase
from sdopt.bench.case.suites import SuiteRun, expand
from sdopt.bench.measure.conditions import list_condition_problems, list_problems
from sdopt.bench.measure.process_environment import measure_machine, read_cpu_use
from sdopt.disk.digest import digest_of
from sdopt.disk.files import disk_errors, write_file
from sdopt.errors import ArtifactError, SdoptError, UsageError
from sdopt.machine.environment import describe_machine
from sdopt.perf.history.fingerprint import fingerprint_of
from sdopt.perf.history.history import new_run_id
from sdopt.perf.history.record import FailureRecord, RunKind, RunRecord, SeriesRecord
from sdopt.perf.night.bridge import find_bridge_commit
from sdopt.perf.night.series import list_failures, list_series, merge_conditions
from sdopt.perf.night.sources import find_source
from sdopt.perf.night.worktree import Tree, checked_out
from sdopt.perf.once import PROTOCOL, dump_job

RUN_NAME = "run.json"
SUITE_NAME = "suite.json"


@dataclass(frozen=True)
class Night:
    """What a run measured; reports are by the job's name."""

    record: RunRecord
    reports: Mapping[str, BenchReport]


@dataclass(frozen=True)
class Bundle:
    """A case's bundle as a tree built it, and the store that this tree is to use with it."""

    folder: Path
    store: Path
    digest: str
    build_ns: int | None
    """None where something was found in the store, or the tree does not say."""


@dataclass
class _Findings:
    """What a night has found so far."""

    suite: Suite
    tree: Tree
    command: str
    series: list[SeriesRecord] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    reports: dict[str, BenchReport] = field(default_factory=dict)

    def measure_case(self, case: SuiteCase, folder: Path) -> None:
        """Build the case in the empty `folder` and bench its jobs; what fails is noted."""
        jobs = [job for job in expand(self.suite) if job.case is case]
        progress.update(f"{case.name}: building", 0.0)
        try:
            bundle = build_bundle(self.tree, case, folder, jobs[0].method.time_limit_s)
        except SdoptError as error:
            self._fail(jobs, error)
            return
        for job in jobs:
            try:
                report = self._bench(bundle, job, folder / f"{job.name}.report.json")
            except SdoptError as error:
                self._fail([job], error)
                continue
            self.reports[job.name], self.digests[job.name] = report, bundle.digest
            self.series += list_series(job.name, report, bundle.build_ns if job is jobs[0] else None)
            self.failures += list_failures(job.name, report)

    def _bench(self, bundle: Bundle, job: SuiteRun, path: Path) -> BenchReport:
        arguments = {
            "protocol": PROTOCOL, "folder": str(bundle.folder), "job": dump_job(job), "report": str(path),
            "command": self.command, "suite": self.suite.name,
        }  # fmt: skip
        self.tree.call("bench", arguments, bundle.store)
        return read_report(path)

    def _fail(self, jobs: list[SuiteRun], error: SdoptError) -> None:
        self.failures += [FailureRecord(case=job.name, candidate="", message=str(error)) for job in jobs]


def find_job(suite: Suite, name: str) -> SuiteRun:
    """The job of that name. Raises `UsageError` where the suite has none."""
    jobs = {job.name: job for job in expand(suite)}
    if name not in jobs:
        raise UsageError(f"the suite {suite.name} has no case {name!r}", hint=f"it has: {', '.join(jobs)}")
    return jobs[name]


def digest_suite(suite: Suite) -> str:
    return digest_of(suite.model_dump(mode="json"))


def build_bundle(tree: Tree, case: SuiteCase, folder: Path, timeout_s: float) -> Bundle:
    """Build a case's bundle in `folder`, an empty one, with a store of its own. Raises what the build raises."""
    arguments = {
        "protocol": PROTOCOL, "source": str(find_source(case.source)), "recipe": case.recipe,
        "output": str(folder / case.name),
    }  # fmt: skip
    values = tree.call("build", arguments, folder / "store", timeout_s)
    build_ns = values["wall_ns"] if values["reused"] == [] else None
    return Bundle(folder / case.name, folder / "store", str(values["digest"]), build_ns)


def measure_suite(suite: Suite, tree: Tree, work: Path, kind: RunKind = RunKind.NIGHTLY, command: str = "") -> Night:
    """Build and bench every case with the code of `tree`; `work` is an existing folder for what is not kept.

    Failures of cases and candidates are in the record. Raises `UsageError` for a source that is not there.
    """
    for case in suite.cases:
        find_source(case.source)  # before an hour of work, not after it
    before, start_ns, now = read_cpu_use(), time.monotonic_ns(), datetime.now(UTC)
    found = _Findings(suite, tree, command)
    for case in suite.cases:
        with tempfile.TemporaryDirectory(dir=work, prefix=f"{case.name}-") as folder:
            found.measure_case(case, Path(folder))
    machine, environment = measure_machine(before), describe_machine()
    conditions = merge_conditions([machine.conditions, *(r.machine.conditions for r in found.reports.values())])
    record = RunRecord(
        id=new_run_id(now), created_utc=now.isoformat(timespec="seconds"), kind=kind, suite=suite.name,
        suite_digest=digest_suite(suite), commit=tree.commit, changed=tree.changed,
        fingerprint=fingerprint_of(environment, machine.logical_cores, machine.memory_bytes),
        environment=environment, logical_cores=machine.logical_cores, memory_bytes=machine.memory_bytes,
        digests=found.digests, dirty=_list_dirt(found.reports, machine.conditions), conditions=conditions,
        series=tuple(found.series), failures=tuple(found.failures), wall_ns=time.monotonic_ns() - start_ns,
    )  # fmt: skip
    return Night(record, found.reports)


def measure_bridge(suite: Suite, records: Sequence[RunRecord], own: Tree) -> RunRecord | None:
    """Where this environment is new to the history: its last good commit, measured in it. Else None.

    The record has no series where that commit cannot run here.
    """
    machine = measure_machine(read_cpu_use())
    fingerprint = fingerprint_of(describe_machine(), machine.logical_cores, machine.memory_bytes)
    commit = find_bridge_commit(records, fingerprint, digest_suite(suite), own.commit)
    if not commit:
        return None
    with checked_out(own.root, commit) as tree, tempfile.TemporaryDirectory(prefix="sdopt-bridge-") as work:
        return measure_suite(suite, tree, Path(work), RunKind.BRIDGE).record


def _list_dirt(reports: Mapping[str, BenchReport], whole: Conditions) -> tuple[str, ...]:
    """By case; where no case says anything, of the whole run, with its builds."""
    by_case = [f"{name}: {problem}" for name, report in reports.items() for problem in list_problems(report)]
    return tuple(by_case or list_condition_problems(whole))


def write_night(folder: Path, suite: Suite, night: Night) -> Path:
    """Write the record, the suite and the reports into a new folder of the run's id; returns that folder."""
    place = folder / night.record.id
    with disk_errors(place):
        place.mkdir(parents=True)
        for name, report in night.reports.items():
            write_file(place / f"{name}.report.json", report.to_json())
        write_file(place / SUITE_NAME, (suite.model_dump_json(indent=1) + "\n").encode())
        # Last: a folder with a record is whole.
        write_file(place / RUN_NAME, (night.record.model_dump_json() + "\n").encode())
    return place


def read_night(folder: Path) -> tuple[Suite, RunRecord]:
    """The suite and the record of a run's folder. Raises `ArtifactError` where they cannot be read."""
    try:
        suite = Suite.model_validate_json((folder / SUITE_NAME).read_bytes())
        return suite, RunRecord.model_validate_json((folder / RUN_NAME).read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{folder} holds no run: {error.strerror}", hint="sdopt perf run makes one, and says where"
        ) from error
    except ValidationError as error:
        raise ArtifactError(f"{folder} is damaged: {error.errors()[0]['msg']}", hint="sdopt perf run again") from error
