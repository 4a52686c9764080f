"""A night from a suite to its record, with trees that are planted: what is measured, what fails, what goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.case.report import Conditions, ProcessRecord, Stage, Status, write_report
from sdopt.bench.case.suite import Suite, SuiteCase, SuiteMethod
from sdopt.bench.case.suites import expand
from sdopt.errors import ArtifactError, BackendError, ExportError, UsageError
from sdopt.perf import judge_run as judge
from sdopt.perf.gate import confirm
from sdopt.perf.gate.confirm import Side, measure_pairs, share_time
from sdopt.perf.gate.findings import Outcome, Rule
from sdopt.perf.history.history import History
from sdopt.perf.history.record import Metric, RunKind, RunRecord, SeriesKey
from sdopt.perf.judge_run import accept_by_hand, find_pending, judge_run
from sdopt.perf.night import nightly
from sdopt.perf.night.nightly import Bundle, Night, find_job, measure_suite, read_night, write_night
from sdopt.perf.night.series import list_failures, list_series, merge_conditions
from sdopt.perf.night.worktree import Tree
from sdopt.processes.channel import JsonTable
from tests.planted_reports import make_report
from tests.planted_runs import make_key, make_nights, make_run

SUITE = Suite(
    name="planted",
    cases=(
        SuiteCase(name="one", source="tiny-shapes"),
        SuiteCase(name="two", source="tiny-shapes", steps=(5, 10), method=SuiteMethod(repeats=7)),
    ),
)
CLEAN = Conditions(neighbours_cores=0.0)


@dataclasses.dataclass(frozen=True)
class PlantedTree(Tree):
    """Answers without a process; `answer` gets what the child would."""

    answer: Callable[[str, JsonTable], JsonTable] = lambda target, arguments: {}

    def call(self, target: str, arguments: JsonTable, cache: Path, timeout_s: float | None = None) -> JsonTable:
        return self.answer(target, arguments)


def bench_well(target: str, arguments: JsonTable) -> JsonTable:
    if target == "build":
        return {"digest": "d1" * 32, "wall_ns": 7, "reused": []}
    write_report(Path(arguments["report"]), make_report())
    return {}


def plant(answer: Callable[[str, JsonTable], JsonTable], root: Path = Path("/tree"), commit: str = "c0" * 20) -> Tree:
    return PlantedTree(root, commit, answer=answer)


def measure(tmp_path: Path, answer: Callable[[str, JsonTable], JsonTable]) -> Night:
    return measure_suite(SUITE, plant(answer), tmp_path, RunKind.NIGHTLY, "command")


def test_a_case_with_several_steps_is_several_jobs() -> None:
    assert [(job.name, job.steps, job.method.repeats) for job in expand(SUITE)] == [
        ("one", 20, 3), ("two-5", 5, 7), ("two-10", 10, 7),
    ]  # fmt: skip
    assert find_job(SUITE, "two-10").steps == 10
    with pytest.raises(UsageError, match="two"):
        find_job(SUITE, "two")


def test_a_night_has_every_job_and_each_case_is_built_once(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def answer(target: str, arguments: JsonTable) -> JsonTable:
        asked.append((target, Path(arguments["output"]).name if target == "build" else arguments["job"]["name"]))
        return bench_well(target, arguments)

    night = measure(tmp_path, answer)
    assert asked == [("build", "one"), ("bench", "one"), ("build", "two"), ("bench", "two-5"), ("bench", "two-10")]
    assert night.reports.keys() == {"one", "two-5", "two-10"}
    assert night.record.digests == dict.fromkeys(night.reports, "d1" * 32)
    builds = [series.key.case for series in night.record.series if series.key.metric is Metric.BUILD]
    assert builds == ["one", "two-5"], "a build counts once"
    assert night.record.commit == "c0" * 20
    assert night.record.failures == ()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_or_benched_is_a_failure_and_the_others_go_on(tmp_path: Path) -> None:
    def answer(target: str, arguments: JsonTable) -> JsonTable:
        if target == "build" and arguments["output"].endswith("two"):
            raise ExportError("planted", hint="mend it")
        return bench_well(target, arguments)

    record = measure(tmp_path, answer).record
    assert [(f.case, f.candidate) for f in record.failures] == [("two-5", ""), ("two-10", "")]
    assert "planted" in record.failures[0].message
    assert {series.key.case for series in record.series} == {"one"}

    def answer_late(target: str, arguments: JsonTable) -> JsonTable:
        if target == "bench" and arguments["job"]["name"] == "two-5":
            raise BackendError("planted")
        return bench_well(target, arguments)

    record = measure(tmp_path, answer_late).record
    assert [(f.case, f.candidate) for f in record.failures] == [("two-5", "")]
    assert {series.key.case for series in record.series} == {"one", "two-10"}


def test_a_build_from_a_store_has_no_time(tmp_path: Path) -> None:
    def answer(target: str, arguments: JsonTable) -> JsonTable:
        return {**bench_well(target, arguments), **({"reused": ["graph"]} if target == "build" else {})}

    assert not [s for s in measure(tmp_path, answer).record.series if s.key.metric is Metric.BUILD]


def test_a_source_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    suite = Suite(name="x", cases=(SUITE.cases[0], SuiteCase(name="gone", source="/none/at/all")))
    with pytest.raises(UsageError, match="/none/at/all"):
        measure_suite(suite, plant(lambda target, arguments: pytest.fail("it began")), tmp_path)


def test_series_have_the_samples_of_the_report() -> None:
    report = make_report()
    found = {series.key: series.groups for series in list_series("one", report, 7)}
    for candidate in report.candidates:
        for stage in Stage:
            key = SeriesKey(case="one", candidate=candidate.name, metric=Metric(stage.value))
            expected = candidate.samples_of(stage)
            assert found.get(key, ()) == tuple(tuple(map(float, group)) for group in expected)
    key = make_key(Metric.BUNDLE_SIZE, case="one")
    assert found[key] == ((float(report.case.bundle_bytes),),)
    assert found[make_key(Metric.BUILD, case="one")] == ((7.0,),)


def test_a_record_with_equal_pictures_survives_the_disk(tmp_path: Path) -> None:
    night = measure(tmp_path, bench_well)
    series = make_run(0, {make_key(Metric.PSNR): ((float("inf"), 40.0),)}).series
    night = dataclasses.replace(night, record=night.record.model_copy(update={"series": series}))
    folder = write_night(tmp_path / "runs", SUITE, night)
    suite, record = read_night(folder)
    assert (suite, record) == (SUITE, night.record)
    assert {path.name for path in folder.glob("*.report.json")} == {f"{name}.report.json" for name in night.reports}


def test_failures_are_rows_that_failed() -> None:
    report = make_report()
    values = {"name": "compile", "status": Status.FAILED, "message": "it hung", "processes": ()}
    report = report.model_copy(
        update={"candidates": (report.candidates[0], report.candidates[1].model_copy(update=values))}
    )
    assert [(f.candidate, f.message) for f in list_failures("one", report)] == [("compile", "it hung")]
    assert {series.key.candidate for series in list_series("one", report, None)} == {report.candidates[0].name}


def test_merged_conditions_are_the_worst() -> None:
    merged = merge_conditions(
        [
            Conditions(neighbours_cores=0.1, clock_mhz=(1000, 2000), throttled=1),
            Conditions(neighbours_cores=0.3, clock_mhz=(900, 1500), throttled=2, steal_cores=0.2, clock_steps=1),
        ]
    )
    assert merged == Conditions(
        neighbours_cores=0.3, clock_mhz=(900, 2000), throttled=3, steal_cores=0.2, clock_steps=1
    )
    assert merge_conditions([Conditions(), Conditions()]) == Conditions()


def make_process(step_ns: int) -> dict[str, Any]:
    record = ProcessRecord(
        position=0, import_ns=1, load_ns=2, first_picture_ns=3, cold_start_ns=6, peak_rss_bytes=100,
        samples_ns={Stage.UNET_STEP: (step_ns, step_ns + 1)},
    )  # fmt: skip
    return record.model_dump(mode="json")


def plant_side(name: str, step_ns: int, order: list[str]) -> Side:
    def answer(target: str, arguments: JsonTable) -> JsonTable:
        order.append(name)
        return {"process": make_process(step_ns)}

    return Side(plant(answer), Bundle(Path("/bundle"), Path("/store"), "", None))


def test_pairs_take_turns_and_keep_their_sides() -> None:
    order: list[str] = []
    pairs = measure_pairs(plant_side("A", 100, order), plant_side("B", 200, order), expand(SUITE)[0], "e", count=4)
    assert pairs is not None
    assert "".join(order) == "ABBAABBA"
    answer = pairs.confirm(Metric.UNET_STEP)
    assert answer is not None
    assert list(answer.baseline) == [[100, 101]] * 4
    assert list(answer.candidate) == [[200, 201]] * 4
    assert pairs.confirm(Metric.PSNR) is None


def test_a_deadline_ends_the_pairs_or_forbids_them(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(confirm.time, "monotonic", lambda: now[0])

    def slow_side(name: str) -> Side:
        def answer(target: str, arguments: JsonTable) -> JsonTable:
            now[0] += 5.0
            order.append(name)
            return {"process": make_process(100)}

        return Side(plant(answer), Bundle(Path("/bundle"), Path("/store"), "", None))

    def run(deadline_s: float) -> int:
        order.clear()
        now[0] = 0.0
        job = expand(SUITE)[0]
        pairs = measure_pairs(slow_side("A"), slow_side("B"), job, "e", count=6, deadline_s=deadline_s)
        return 0 if pairs is None else len(pairs.baseline)

    assert run(1000.0) == 6
    assert run(35.0) == 3
    assert run(15.0) == 0, "one pair says nothing"


def test_an_a_b_beside_a_neighbour_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate counts it as none, and the page has to say why it waits for the next night."""
    key = make_key(Metric.UNET_STEP, case=expand(SUITE)[0].name)
    tree = Tree(Path("/nowhere"), "1" * 40)
    side = plant_side("A", 100, [])
    monkeypatch.setattr(confirm, "checked_out", lambda root, commit: contextlib.nullcontext(tree))
    monkeypatch.setattr(confirm, "opened_side", lambda tree, job: contextlib.nullcontext(side))
    for dirty, said in (("other programs kept 1.0 cores busy", "other programs kept 1.0 cores"), ("", "")):
        problems = [dirty] if dirty else []
        monkeypatch.setattr(confirm, "list_condition_problems", lambda conditions, problems=problems: tuple(problems))
        asked = confirm.SameNight(SUITE, tree, "0" * 40, budget_s=60)
        answers = asked([key])
        assert answers is not None
        assert answers[key].dirty == tuple(problems)
        assert (said in asked.obstacle) if said else asked.obstacle == ""


class Nights:
    """A history of seven nights and a run that waits, with what the A/B would say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.history = History(folder / "history.jsonl")
        self.runs = folder / "runs"
        self.digest = nightly.digest_suite(SUITE)
        for record in make_nights(7, {make_key(case="one"): 100.0}, suite_digest=self.digest):
            self.history.append(record)
        self.asked: list[Sequence[SeriesKey]] = []
        self.own = Tree(folder, "f0" * 20)
        monkeypatch.setattr(judge, "find_own_tree", lambda: self.own)

    def wait(self, value: float, night: int = 7, **changes: Any) -> Path:
        values = {make_key(case="one"): value}
        fields = {"suite_digest": self.digest, "commit": self.own.commit, "verdict": ""} | changes
        return write_night(self.runs, SUITE, Night(make_run(night, values, **fields), {}))

    def records(self) -> tuple[RunRecord, ...]:
        return self.history.read().records


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    return Nights(tmp_path, monkeypatch)


def test_a_quiet_night_passes_and_is_appended_once(nights: Nights) -> None:
    folder = nights.wait(100.0)
    assert find_pending(nights.runs, nights.history) == folder
    judged = judge_run(folder, nights.history, confirm_s=0)
    assert judged.report.exit_code == 0
    assert nights.records()[-1] == judged.record
    assert judged.record.verdict == "pass"
    assert {"gate.json", "gate.md", "gate.html"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(UsageError, match="waits"):
        find_pending(nights.runs, nights.history)
    assert judge_run(folder, nights.history, confirm_s=0).report == judged.report
    assert len(nights.records()) == 8


@pytest.mark.parametrize(("factor", "outcome"), [(1.2, Outcome.SLOWER), (1.0, Outcome.CLEARED)])
def test_a_suspect_is_measured_again_beside_the_last_good_commit(
    nights: Nights, factor: float, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_again(self: confirm.SameNight, keys: Sequence[SeriesKey]) -> dict[SeriesKey, confirm.Confirmation]:
        nights.asked.append(keys)
        assert self.good_commit == nights.records()[0].commit
        base = [[1000 + 7 * p + i for i in range(5)] for p in range(6)]
        return {key: confirm.Confirmation(base, [[round(s * factor) for s in group] for group in base]) for key in keys}

    monkeypatch.setattr(confirm.SameNight, "__call__", measure_again)
    judged = judge_run(nights.wait(120.0), nights.history, confirm_s=60)
    assert nights.asked == [[make_key(case="one")]]
    assert [suspect.outcome for suspect in judged.report.suspects] == [outcome]
    assert judged.report.exit_code == (3 if factor > 1 else 0)
    assert (Rule.SLOWER in {finding.rule for finding in judged.report.findings}) == (factor > 1)
    assert nights.records()[-1].verdict == ("alarm" if factor > 1 else "pass")


def test_without_the_code_of_the_run_there_is_no_a_b_and_the_page_says_so(nights: Nights) -> None:
    judged = judge_run(nights.wait(120.0, commit="ee" * 20), nights.history, confirm_s=60)
    assert judged.report.suspects[0].outcome is Outcome.OPEN
    assert judged.record.verdict == ""
    assert "not that of the run" in judged.page.read_text()


def test_an_old_commit_that_cannot_run_is_no_answer_and_says_why(nights: Nights) -> None:
    """The last good commit of the planted history is in no repository."""
    judged = judge_run(nights.wait(120.0), nights.history, confirm_s=60)
    assert judged.report.suspects[0].outcome is Outcome.OPEN
    assert any(note.startswith("no A/B against") for note in judged.report.notes)


def test_an_accepted_run_is_the_new_usual(nights: Nights) -> None:
    """Two nights in a row alarm without an A/B; once accepted, a third of the same speed is not an alarm."""
    codes = []
    for night in (7, 8):
        codes.append(judge_run(nights.wait(130.0, night), nights.history, confirm_s=0).report.exit_code)
    assert codes == [0, 3]
    accept_by_hand(nights.history, nights.records()[-1].id)
    assert judge_run(nights.wait(130.0, 10), nights.history, confirm_s=0).report.exit_code == 0


def test_a_folder_that_is_no_run_is_said(tmp_path: Path, nights: Nights) -> None:
    with pytest.raises(ArtifactError, match="holds no run"):
        read_night(tmp_path / "none")
    folder = nights.wait(100.0)
    (folder / "run.json").write_text(json.dumps({"id": 1}))
    with pytest.raises(ArtifactError, match="damaged"):
        read_night(folder)


def test_what_one_case_leaves_of_the_time_is_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(confirm.time, "monotonic", lambda: now_s[0])
    ends = []
    for name, until_s in share_time(["a", "b", "c"], 90.0):
        ends.append((name, until_s))
        now_s[0] = 10.0 if name == "a" else until_s
    assert ends == [("a", 30.0), ("b", 50.0), ("c", 90.0)]
