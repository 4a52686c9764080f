"""Statistics against formulas and planted differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.bench.case.stats import Speed, _compare_processes, compare_speed, fit_steps, judge_pair, summarize

GROUPS = st.lists(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), min_size=1, max_size=4)


@given(GROUPS)
def test_percentiles_are_ordered_and_within_the_samples(groups: list[list[int]]) -> None:
    summary = summarize(groups)
    assert summary is not None
    pooled = [sample for group in groups for sample in group]
    assert summary.count == len(pooled)
    assert min(pooled) == summary.min_ns <= summary.median_ns <= summary.p90_ns <= summary.p95_ns <= summary.p99_ns
    assert summary.p99_ns <= summary.max_ns == max(pooled)
    assert min(pooled) <= summary.median_low_ns <= summary.median_high_ns <= max(pooled)
    assert summary.mean_ns == pytest.approx(sum(pooled) / len(pooled))


def test_known_percentiles() -> None:
    summary = summarize([range(1, 51), range(51, 102)])
    assert summary is not None
    assert (summary.p50_ns, summary.p90_ns, summary.p95_ns, summary.p99_ns) == (51, 91, 96, 100)
    assert (summary.min_ns, summary.max_ns, summary.mean_ns) == (1, 101, 51)
    assert summary.variation == pytest.approx((101 * 102 / 12) ** 0.5 / 51)  # variance of 1 … n: n (n + 1) / 12


def test_noise_is_flagged_above_two_and_a_half_per_cent() -> None:
    quiet, noisy, single = summarize([[980, 1020] * 20]), summarize([[970, 1030] * 20]), summarize([[5]])
    assert quiet is not None
    assert noisy is not None
    assert single is not None
    assert (quiet.is_noisy, noisy.is_noisy, single.is_noisy) == (False, True, False)
    assert single.variation == 0


def test_the_interval_of_a_median_covers_it() -> None:
    rng = np.random.default_rng(11)
    found = [summarize([1e8 * rng.lognormal(0, 0.02, 30)]) for _ in range(200)]
    covered = sum(one is not None and one.median_low_ns <= 1e8 <= one.median_high_ns for one in found)
    assert 0.9 <= covered / 200 <= 0.99


def test_nothing_has_no_statistics() -> None:
    assert summarize([]) is None
    assert summarize([[]]) is None
    assert compare_speed([], [[1]]) is None
    assert compare_speed([[1]], [[]]) is None


def draw(scale: float, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(x) for x in scale * 1e8 * rng.lognormal(0, 0.02, 20)] for _ in range(3)]


def test_a_planted_ratio_lies_in_its_interval() -> None:
    ratio = compare_speed(draw(2.0, 1), draw(1.0, 2))
    assert ratio is not None
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.high - ratio.low < 0.2


def test_two_runs_of_the_same_are_not_told_apart() -> None:
    ratio = compare_speed(draw(1.0, 3), draw(1.0, 4))
    assert ratio is not None
    assert ratio.low <= 1 <= ratio.high


def test_the_interval_is_the_same_each_time_and_its_inverse_is_near() -> None:
    a, b = draw(1.5, 5), draw(1.0, 6)
    assert compare_speed(a, b) == compare_speed(a, b)
    forth, back = compare_speed(a, b), compare_speed(b, a)
    assert forth is not None
    assert back is not None
    assert forth.value * back.value == pytest.approx(1)


@given(GROUPS)
@settings(max_examples=3, deadline=None)
def test_scaling_the_baseline_scales_the_ratio(groups: list[list[int]]) -> None:
    one = compare_speed(groups, groups)
    two = compare_speed([[2 * sample for sample in group] for group in groups], groups)
    assert one is not None
    assert two is not None
    assert one.value == pytest.approx(1)
    assert two.value == pytest.approx(2)


def test_processes_that_differ_widen_the_interval() -> None:
    same = [[100 + i % 3 for i in range(20)] for _ in range(4)]
    apart = [[sample + 20 * k for sample in group] for k, group in enumerate(same)]
    narrow, wide = compare_speed(same, [[100]]), compare_speed(apart, [[100]])
    assert narrow is not None
    assert wide is not None
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def simulate(rng: np.random.Generator, scale: float, processes: int) -> list[list[float]]:
    """Ten samples in each of some processes, with 1 % of noise between processes and 1 % within."""
    return [list(scale * 1e8 * np.exp(rng.normal(0, 0.01) + rng.normal(0, 0.01, 10))) for _ in range(processes)]


def share_told_apart(scale: float, processes: int, runs: int, wanted: set[Speed]) -> float:
    rng = np.random.default_rng(5)
    verdicts = [judge_pair(simulate(rng, scale, processes), simulate(rng, 1.0, processes)) for _ in range(runs)]
    return sum(verdict is not None and verdict.speed in wanted for verdict in verdicts) / runs


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_two_of_the_same_are_rarely_told_apart(processes: int) -> None:
    assert share_told_apart(1.0, processes, 300, {Speed.FASTER, Speed.SLOWER}) <= 0.05


def test_ten_per_cent_are_found_with_three_processes() -> None:
    assert share_told_apart(1.1, 3, 200, {Speed.FASTER}) >= 0.95
    assert share_told_apart(1 / 1.1, 3, 200, {Speed.SLOWER}) >= 0.95


def test_welchs_test_agrees_with_a_published_example() -> None:
    """Six screws of two machines each: t = 1.959, 7.031 degrees of freedom, p = 0.09077 (two-sided).

    https://en.wikipedia.org/wiki/Student%27s_t-test, unequal variances; 2.3631 is Student's t for 95 % and 7.031.
    """
    screws = [30.02, 29.99, 30.11, 29.97, 30.01, 29.99], [29.89, 29.93, 29.72, 29.98, 30.02, 29.98]
    welch = _compare_processes(*([[math.exp(grams)] for grams in each] for each in screws))
    assert welch is not None
    assert welch.p_value == pytest.approx(0.09077, abs=1e-5)
    half = 2.3631 * 0.095 / 1.959
    assert (math.log(welch.low), math.log(welch.high)) == pytest.approx((0.095 - half, 0.095 + half), abs=1e-4)


@pytest.mark.parametrize(("ratio", "p_value"), [(1.0, 1.0), (1.1, 0.0)])
def test_processes_that_do_not_differ_at_all_need_no_test(ratio: float, p_value: float) -> None:
    welch = _compare_processes([[ratio * 1e8]] * 3, [[1e8]] * 3)
    assert welch is not None
    assert (welch.low, welch.high, welch.p_value) == pytest.approx((ratio, ratio, p_value))


def test_one_side_whose_processes_do_not_differ_is_tested() -> None:
    welch = _compare_processes([[1e8]] * 3, [[1e8], [1.01e8], [1.02e8]])
    assert welch is not None
    assert (welch.low, welch.high, welch.p_value) == pytest.approx((0.966075, 1.014787, 0.224894), abs=1e-6)


def test_samples_of_two_processes_are_not_taken_for_independent() -> None:
    """Each process has a place of its own, and the rank test alone would call it a difference."""
    baseline = [[1000 + i for i in range(50)], [1100 + i for i in range(50)]]
    candidate = [[960 + i for i in range(50)], [1060 + i for i in range(50)]]
    verdict = judge_pair(baseline, candidate)
    assert verdict is not None
    assert verdict.speed is Speed.NO_DIFFERENCE
    assert "holds 1" in verdict.reason
    assert verdict.p_value > 0.05


def test_a_difference_below_two_per_cent_is_none() -> None:
    rng = np.random.default_rng(3)
    groups = [[[scale * 1e6 * (1 + 1e-4 * x) for x in rng.normal(size=30)] for _ in range(5)] for scale in (1.015, 1)]
    verdict = judge_pair(*groups)
    assert verdict is not None
    assert verdict.ratio.low > 1
    assert verdict.p_value < 0.001
    assert verdict.speed is Speed.NO_DIFFERENCE
    assert "2%" in verdict.reason


def test_one_process_says_nothing_of_how_processes_differ() -> None:
    verdict = judge_pair([[100, 101, 102]], [[50, 51, 52], [50, 51, 52]])
    assert verdict is not None
    assert (verdict.speed, verdict.p_value) == (Speed.NO_DIFFERENCE, 1.0)
    assert "measure two" in verdict.reason
    assert judge_pair([], [[1]]) is None


def test_a_line_separates_what_a_call_costs_from_what_a_step_costs() -> None:
    fit = fit_steps({5: [300, 300], 10: [500], 20: [900, 900]})
    assert fit is not None
    assert (fit.fixed_ns, fit.per_step_ns) == (pytest.approx(100), pytest.approx(40))
    assert (fit.per_step_low_ns, fit.per_step_high_ns) == (pytest.approx(40), pytest.approx(40))
    assert fit.residual_ns == pytest.approx(0, abs=1e-6)
    assert fit_steps({20: [900, 901]}) is None
    assert fit_steps({}) is None


def test_the_interval_of_a_step_covers_it() -> None:
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(200):
        fit = fit_steps({n: list((1e7 + 4e6 * n) * (1 + rng.normal(0, 0.02, 4))) for n in (5, 10, 20)})
        assert fit is not None
        covered += fit.per_step_low_ns <= 4e6 <= fit.per_step_high_ns
    assert 0.9 <= covered / 200 <= 0.99
