"""The gate of `sdopt perf`: every rule just below and just above its threshold, and the histories that mislead it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sdopt.perf.gate.confirm_rules import Confirm, Confirmation
from sdopt.perf.gate.findings import Evidence, GateReport, Outcome, Rule
from sdopt.perf.gate.gate import BLIND_NIGHTS, judge_night
from sdopt.perf.history.nights import PROVEN_RUNS, accept_run, find_last_good, select_nights, take_value
from sdopt.perf.history.record import FailureRecord, Metric, RunKind, RunRecord, SeriesKey
from tests.planted_runs import NEWER_ENVIRONMENT, Value, make_groups, make_key, make_nights, make_run, make_series

KEY = make_key()
MS = 1e6
MIB = float(1 << 20)


def make_history(count: int = 14, values: Mapping[SeriesKey, Value] | None = None, **changes: Any) -> list[RunRecord]:
    """Nights that differ by 0.2 %."""
    values = values or {KEY: 100 * MS}
    return [
        make_run(night, {key: value * (1 + 0.002 * (night % 3 - 1)) for key, value in values.items()}, **changes)
        for night in range(count)
    ]


def confirm_as(change: float, spread: float = 0.002, dirty: tuple[str, ...] = ()) -> Confirm:
    """An A/B of six processes a side that says that everything takes this part more."""

    def confirm(suspects: Sequence[SeriesKey]) -> dict[SeriesKey, Confirmation]:
        sides = (make_groups(100 * MS, spread, 6), make_groups(100 * MS * (1 + change), spread, 6))
        return {key: Confirmation(*sides, dirty=dirty) for key in suspects}

    return confirm


def fail_confirm(_: Sequence[SeriesKey]) -> None:
    pytest.fail("nothing should have been measured again")


def list_rules(report: GateReport) -> list[Rule]:
    return [finding.rule for finding in report.findings]


def test_a_usual_night_passes_and_measures_nothing_again() -> None:
    report = judge_night(make_history(), make_run(14, {KEY: 101 * MS}), fail_confirm)
    assert (report.verdict, report.exit_code, report.recorded_verdict) == ("pass", 0, "pass")
    assert (report.nights, report.screened, report.suspects) == (14, 1, ())


@pytest.mark.parametrize(("tonight", "asked"), [(101.9, False), (102.1, True), (98.1, False), (97.9, True)])
def test_two_per_cent_are_suspicious(tonight: float, asked: bool) -> None:
    report = judge_night(make_history(), make_run(14, {KEY: tonight * MS}), confirm_as(0.0))
    assert [suspect.outcome for suspect in report.suspects] == [Outcome.CLEARED] * asked
    assert report.verdict == "pass"


def test_a_slow_down_is_confirmed_in_the_same_night() -> None:
    history = make_history()
    report = judge_night(history, make_run(14, {KEY: 105 * MS}), confirm_as(0.05))
    (finding,) = report.findings
    assert (finding.rule, finding.series, finding.evidence) == (Rule.SLOWER, KEY, Evidence.SAME_NIGHT)
    assert finding.change == pytest.approx(0.05)
    assert finding.q_value is not None
    assert finding.q_value < 0.02
    assert (report.exit_code, report.recorded_verdict) == (3, "alarm")
    assert report.last_good_commit == find_last_good(history, make_run(14, {})).commit


def test_an_ab_of_less_than_two_per_cent_clears_whatever_its_noise() -> None:
    for spread in (0.002, 0.1):
        report = judge_night(make_history(), make_run(14, {KEY: 105 * MS}), confirm_as(0.015, spread))
        assert [suspect.outcome for suspect in report.suspects] == [Outcome.CLEARED]
        assert report.recorded_verdict == "pass"


@pytest.mark.parametrize(
    ("change", "spread", "found"), [(0.05, 0.045, True), (0.05, 0.1, False), (-0.05, 0.045, False)]
)
def test_an_ab_that_leaves_doubt_clears_nothing_and_has_to_lean(change: float, spread: float, found: bool) -> None:
    """It does not show 5 % beyond doubt. The next night decides, where the A/B says the same by more than chance."""
    history = make_history()
    report = judge_night(history, make_run(14, {KEY: 105 * MS}), confirm_as(change, spread))
    assert [suspect.outcome for suspect in report.suspects] == [Outcome.OPEN]
    assert report.recorded_verdict == ""
    slow = make_run(14, {KEY: 105 * MS}, verdict="")
    second = judge_night([*history, slow], make_run(15, {KEY: 105 * MS}), confirm_as(change, spread))
    assert [finding.evidence for finding in second.findings] == [Evidence.TWO_NIGHTS] * found


@pytest.mark.parametrize("nights", [1, 2, 4])
def test_with_few_nights_their_spread_hides_nothing(nights: int) -> None:
    """Two nights 3 % apart have a MAD of 1.5 %: four of them would let 5 % pass unseen."""
    history = [make_run(night, {KEY: (100 + 3 * (night % 2)) * MS}) for night in range(nights)]
    report = judge_night(history, make_run(nights, {KEY: 107 * MS}), confirm_as(0.05))
    assert list_rules(report) == [Rule.SLOWER]


def test_the_sign_of_the_ab_counts() -> None:
    report = judge_night(make_history(), make_run(14, {KEY: 95 * MS}), confirm_as(0.04))
    assert list_rules(report) == [Rule.SLOWER]


def test_improvements_alarm_beyond_five_per_cent() -> None:
    for change, rules in ((-0.045, []), (-0.055, [Rule.IMPROVED])):
        report = judge_night(make_history(), make_run(14, {KEY: 100 * MS * (1 + change)}), confirm_as(change))
        assert [suspect.outcome for suspect in report.suspects] == [Outcome.FASTER]
        assert list_rules(report) == rules


def test_many_series_are_held_to_a_stricter_level() -> None:
    """The same A/B that alone is beyond doubt is not one among 40 that show nothing."""
    keys = [make_key(case=f"case{i}") for i in range(40)]
    history = make_history(values=dict.fromkeys(keys, 100 * MS))
    doubtful = {KEY: confirm_as(0.025, spread=0.015)([KEY])[KEY]}

    def confirm(suspects: Sequence[SeriesKey]) -> dict[SeriesKey, Confirmation]:
        return {key: doubtful[KEY] if key == keys[0] else confirm_as(0.0)([key])[key] for key in suspects}

    alone = judge_night(history, make_run(14, dict.fromkeys(keys, 100 * MS) | {keys[0]: 106 * MS}), confirm)
    among = judge_night(history, make_run(14, dict.fromkeys(keys, 106 * MS)), confirm)
    assert list_rules(alone) == [Rule.SLOWER]
    assert len(among.suspects) == 40
    assert list_rules(among) == []


@pytest.mark.parametrize("confirm", [None, lambda _: None, lambda _: {}, confirm_as(0.05, dirty=("a neighbour",))])
def test_without_a_confirmation_two_nights_in_a_row_alarm(confirm: Confirm | None) -> None:
    history = make_history()
    first = judge_night(history, make_run(14, {KEY: 105 * MS}), confirm)
    assert (first.exit_code, first.recorded_verdict) == (0, "")
    assert [suspect.outcome for suspect in first.suspects] == [Outcome.OPEN]
    assert any("next night" in note for note in first.notes)
    slow = make_run(14, {KEY: 105 * MS}, verdict=first.recorded_verdict)
    second = judge_night([*history, slow], make_run(15, {KEY: 105 * MS}), confirm)
    assert [finding.evidence for finding in second.findings] == [Evidence.TWO_NIGHTS]
    assert second.last_good_commit != slow.commit


def test_two_nights_of_opposite_signs_do_not_alarm() -> None:
    slow = make_run(14, {KEY: 105 * MS}, verdict="")
    assert judge_night([*make_history(), slow], make_run(15, {KEY: 95 * MS}), None).exit_code == 0


def test_a_suspicion_that_was_cleared_does_not_count_for_the_next_night() -> None:
    cleared = make_run(14, {KEY: 105 * MS}, verdict="pass")
    assert judge_night([*make_history(), cleared], make_run(15, {KEY: 105 * MS}), None).exit_code == 0


def test_an_alarm_goes_on_until_it_is_repaired() -> None:
    """Nights that alarmed do not become the usual, however many there are."""
    slow = [make_run(night, {KEY: 105 * MS}, verdict="alarm") for night in range(14, 40)]
    report = judge_night([*make_history(), *slow], make_run(40, {KEY: 105 * MS}), confirm_as(0.05))
    assert list_rules(report) == [Rule.SLOWER]
    assert judge_night([*make_history(), *slow], make_run(40, {KEY: 100 * MS}), fail_confirm).exit_code == 0


def test_a_slow_commit_that_passed_is_not_yet_the_good_one() -> None:
    """The first night's screen missed it. The second night is held against the commits before both."""
    history = make_history()
    missed = make_run(14, {KEY: 101.9 * MS})
    good = find_last_good([*history, missed], make_run(15, {}))
    assert good is not None
    assert good.id == history[-(PROVEN_RUNS - 1)].id


def test_the_last_good_run_is_none_that_alarmed_changed_or_is_of_another_series() -> None:
    tonight = make_run(9, {})
    runs = [
        make_run(0, {KEY: MS}),
        make_run(1, {KEY: MS}, verdict="alarm"),
        make_run(2, {KEY: MS}, verdict=""),
        make_run(3, {KEY: MS}, changed=True),
        make_run(4, {KEY: MS}, suite_digest="00" * 32),
        make_run(5, {KEY: MS}, environment=NEWER_ENVIRONMENT),
    ]
    assert find_last_good(runs, tonight) == runs[0]
    assert find_last_good(runs[1:], tonight) is None


def test_acceptance_starts_the_moved_series_anew_and_no_other() -> None:
    other = make_key(Metric.UNET_STEP)
    history = make_history(values={KEY: 100 * MS, other: 10 * MS})
    better = make_run(14, {KEY: 80 * MS, other: 10 * MS}, verdict="alarm")
    accepted = accept_run(better, id="20260115T120000Z-0000acce", created_utc="2026-01-15T12:00:00+00:00")
    tonight = make_run(15, {KEY: 80 * MS, other: 10.9 * MS})
    report = judge_night([*history, better, accepted], tonight, confirm_as(0.09))
    assert [finding.series for finding in report.findings] == [other]
    assert report.last_good_run == accepted.id
    nights = select_nights([*history, better, accepted], tonight, clean=True)
    assert [sum(key in night for night in nights) for key in (KEY, other)] == [1, 14]
    back = judge_night([*history, better, accepted], make_run(15, {KEY: 100 * MS, other: 10 * MS}), confirm_as(0.25))
    assert list_rules(back) == [Rule.SLOWER]


@pytest.mark.parametrize(("metric", "old", "new"), [(Metric.SSIM, 0.98, 0.974), (Metric.PSNR, float("inf"), 60.0)])
def test_accepted_fidelity_is_the_new_measure(metric: Metric, old: float, new: float) -> None:
    key = make_key(metric)
    history = make_nights(14, {key: [[old]]})
    worse = make_run(14, {key: [[new]]})
    assert list_rules(judge_night(history, worse, None)) == [Rule.FIDELITY]
    accepted = accept_run(worse, id="20260115T120000Z-0000acce", created_utc="2026-01-15T12:00:00+00:00")
    assert judge_night([*history, accepted], make_run(15, {key: [[new]]}), None).exit_code == 0


def test_manual_runs_that_nobody_accepted_are_no_nights() -> None:
    manual = make_nights(14, {KEY: 105 * MS}, first=14, kind=RunKind.MANUAL, verdict="")
    report = judge_night([*make_history(), *manual], make_run(30, {KEY: 105 * MS}), confirm_as(0.05))
    assert list_rules(report) == [Rule.SLOWER]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_short_histories(count: int) -> None:
    """No night judges nothing; from the first on an A/B decides, and without one 5 % on two nights."""
    history = make_nights(count, {KEY: 100 * MS})
    usual = judge_night(history, make_run(count, {KEY: 101 * MS}), fail_confirm)
    assert (usual.verdict, usual.nights) == ("pass", count)
    assert any("first clean night" in note for note in usual.notes) == (count == 0)
    slow = judge_night(history, make_run(count, {KEY: 106 * MS}), confirm_as(0.06))
    assert list_rules(slow) == [Rule.SLOWER] * (count > 0)
    if count:
        for value, rules in ((104, []), (106, [Rule.SLOWER])):
            last = make_run(count, {KEY: value * MS}, verdict="")
            assert list_rules(judge_night([*history, last], make_run(count + 1, {KEY: value * MS}), None)) == rules


def test_series_never_cross_a_fingerprint_and_a_bridge_links_them() -> None:
    history = make_history()
    new = {"environment": NEWER_ENVIRONMENT}
    alone = judge_night(history, make_run(15, {KEY: 130 * MS}, **new), fail_confirm)
    assert (alone.verdict, alone.screened) == ("pass", 0)
    bridge = make_run(14, {KEY: 120 * MS}, kind=RunKind.BRIDGE, verdict="", **new)
    same = judge_night([*history, bridge], make_run(15, {KEY: 120 * MS}, **new), fail_confirm)
    assert (same.verdict, same.nights, same.last_good_run) == ("pass", 1, bridge.id)
    slow = judge_night([*history, bridge], make_run(15, {KEY: 126 * MS}, **new), confirm_as(0.05))
    assert list_rules(slow) == [Rule.SLOWER]


def test_dirty_nights_are_neither_judged_by_time_nor_part_of_the_history() -> None:
    history = make_history()
    size = make_key(Metric.BUNDLE_SIZE)
    dirty = {"dirty": ("a neighbour took 0.9 cores",)}
    report = judge_night(history, make_run(14, {KEY: 150 * MS}, **dirty), fail_confirm)
    assert (report.verdict, report.recorded_verdict, report.screened) == ("pass", "", 0)
    assert any("a neighbour took 0.9 cores" in note for note in report.notes)
    noisy = [make_run(night, {KEY: 150 * MS}, verdict="", **dirty) for night in (14, 15)]
    after = judge_night([*history, *noisy], make_run(16, {KEY: 105 * MS}), confirm_as(0.05))
    assert (list_rules(after), after.nights) == ([Rule.SLOWER], 14)
    sized = [*make_nights(3, {KEY: 100 * MS, size: 100 * MIB})]
    grown = judge_night(sized, make_run(3, {KEY: 150 * MS, size: 110 * MIB}, **dirty), fail_confirm)
    assert list_rules(grown) == [Rule.SIZE]


def test_too_many_dirty_nights_in_a_row_alarm() -> None:
    dirty = make_nights(BLIND_NIGHTS, {KEY: 100 * MS}, first=14, dirty=("heat",), verdict="")
    history = make_history()
    assert judge_night([*history, *dirty[:-2]], dirty[-2], None).exit_code == 0
    assert list_rules(judge_night([*history, *dirty[:-1]], dirty[-1], None)) == [Rule.BLIND]
    assert (
        judge_night(
            [*dirty[:-1], make_run(20, {KEY: 100 * MS})], make_run(21, {KEY: MS}, dirty=("heat",)), None
        ).exit_code
        == 0
    )


@pytest.mark.parametrize(
    ("metric", "old", "allowed", "too_much", "rule"),
    [
        (Metric.PEAK_MEMORY, 1000 * MIB, 1029 * MIB, 1031 * MIB, Rule.MEMORY),
        (Metric.DEVICE_MEMORY, 1000 * MIB, 1029 * MIB, 1031 * MIB, Rule.MEMORY),
        (Metric.PEAK_MEMORY, 1000 * MIB, 951 * MIB, 949 * MIB, Rule.IMPROVED),
        (Metric.BUNDLE_SIZE, 1000 * MIB, 1049 * MIB, 1051 * MIB, Rule.SIZE),
        (Metric.BUNDLE_SIZE, 1000 * MIB, 951 * MIB, 949 * MIB, Rule.IMPROVED),
        (Metric.BUILD, 100e9, 124e9, 126e9, Rule.BUILD),
        (Metric.BUILD, 100e9, 76e9, 74e9, Rule.IMPROVED),
        (Metric.PSNR, 40.0, 39.01, 38.99, Rule.FIDELITY),
        (Metric.SSIM, 0.98, 0.9751, 0.9749, Rule.FIDELITY),
    ],
)
def test_limits(metric: Metric, old: float, allowed: float, too_much: float, rule: Rule) -> None:
    key = make_key(metric)

    def judge(value: float) -> list[Rule]:
        history = make_nights(3, {key: [[old]], KEY: 100 * MS})
        return list_rules(judge_night(history, make_run(3, {key: [[value]], KEY: 100 * MS}), fail_confirm))

    assert judge(allowed) == []
    assert judge(too_much) == [rule]


def test_better_pictures_are_no_alarm_and_equal_ones_are_infinitely_good() -> None:
    key = make_key(Metric.PSNR)
    history = make_nights(3, {key: [[40.0, 45.0]]})
    assert judge_night(history, make_run(3, {key: [[60.0, 70.0]]}), None).exit_code == 0
    equal = make_nights(3, {key: [[float("inf")]]})
    assert judge_night(equal, make_run(3, {key: [[float("inf")]]}), None).exit_code == 0
    report = judge_night(equal, make_run(3, {key: [[float("inf"), 80.0]]}), None)
    assert list_rules(report) == [Rule.FIDELITY]
    assert GateReport.model_validate_json(report.to_json()) == report


def test_one_broken_picture_of_many_is_found() -> None:
    key = make_key(Metric.PSNR)
    history = make_nights(3, {key: [[40.0] * 8]})
    assert list_rules(judge_night(history, make_run(3, {key: [[40.0] * 7 + [12.0]]}), None)) == [Rule.FIDELITY]


def test_start_times_never_alarm() -> None:
    keys = [make_key(Metric.COLD_START), make_key(Metric.LOAD)]
    history = make_nights(14, dict.fromkeys(keys, 100 * MS))
    assert judge_night(history, make_run(14, dict.fromkeys(keys, 300 * MS)), fail_confirm).exit_code == 0


def test_missing_series_alarm_by_candidate() -> None:
    gone = [make_key(metric, candidate="compile") for metric in (Metric.END_TO_END, Metric.PEAK_MEMORY)]
    build = make_key(Metric.BUILD)
    history = make_nights(3, dict.fromkeys([KEY, build, *gone], 100 * MS))
    report = judge_night(history, make_run(3, {KEY: 100 * MS}), None)
    (finding,) = report.findings
    assert finding.rule is Rule.MISSING
    assert "tiny/compile lacks end_to_end, peak_memory" in finding.sentence


def test_a_library_that_is_gone_is_missed_although_the_series_is_new() -> None:
    gone = make_key(candidate="compile")
    history = make_nights(3, {KEY: 100 * MS, gone: 100 * MS})
    new = {"environment": NEWER_ENVIRONMENT}
    bridge = make_run(3, {KEY: 100 * MS}, kind=RunKind.BRIDGE, verdict="", **new)
    assert list_rules(judge_night([*history, bridge], make_run(4, {KEY: 100 * MS}, **new), None)) == [Rule.MISSING]


def test_nan_is_missing_and_not_a_pass() -> None:
    nan = [[100 * MS, float("nan")]]
    assert take_value(make_series(KEY, nan)) is None
    assert list_rules(judge_night(make_history(), make_run(14, {KEY: nan}), None)) == [Rule.MISSING]


def test_a_night_without_anything_alarms() -> None:
    assert list_rules(judge_night([], make_run(0, {}), None)) == [Rule.MISSING]


def test_failures_alarm_once_for_each_candidate_until_they_are_accepted() -> None:
    lost = make_key(candidate="compile")
    history = make_nights(3, {KEY: 100 * MS, lost: 100 * MS})
    failure = FailureRecord(case="tiny", candidate="compile", message="it drew NaN")
    failed = make_run(3, {KEY: 100 * MS}, failures=(failure,))
    report = judge_night(history, failed, None)
    assert list_rules(report) == [Rule.FAILED]
    assert "it drew NaN" in report.findings[0].sentence
    assert list_rules(judge_night([], failed, None)) == [Rule.FAILED]
    accepted = accept_run(failed, id="20260104T120000Z-0000acce", created_utc="2026-01-04T12:00:00+00:00")
    again = failed.model_copy(update={"id": "20260105T030000Z-00000004"})
    assert judge_night([*history, failed, accepted], again, None).exit_code == 0


def test_drift_that_no_night_shows_is_found_once_a_week() -> None:
    """0.2 % a night, each against fourteen nights that drifted as well: never 2 % apart."""
    records: list[RunRecord] = []
    found: list[int] = []
    for night in range(42):
        wobble = 1 + 0.001 * (night * 7 % 5 - 2)
        tonight = make_run(night, {KEY: 100 * MS * 1.002**night * wobble}, verdict="")
        report = judge_night(records, tonight, confirm_as(0.0))
        if Rule.DRIFT in list_rules(report):
            found.append(night)
        assert not found or report.looked_for_drift or night != found[-1]
        records.append(tonight.model_copy(update={"verdict": report.recorded_verdict}))
    assert found
    assert found[0] <= 25
    assert all((night - 4) % 7 == 0 for night in found)  # 1 January 2026 is a Thursday


def test_a_run_is_not_held_against_itself() -> None:
    tonight = make_run(14, {KEY: 105 * MS})
    report = judge_night([*make_history(), tonight], tonight, confirm_as(0.05))
    assert (list_rules(report), report.nights) == ([Rule.SLOWER], 14)
