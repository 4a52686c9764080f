"""The gate's statistics against scipy and against examples computed by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, median_abs_deviation, rankdata

from sdopt.errors import ArtifactError
from sdopt.perf.gate.drift import _LEAST_SIDE, _rank, _score_splits, find_steps, is_first_of_week
from sdopt.perf.gate.multiple import adjust_p_values
from sdopt.perf.gate.screen import FEW_NIGHTS, MADS, screen_times
from tests.planted_runs import make_key, make_run


def test_q_values_of_benjamini_and_hochbergs_own_example() -> None:
    """The 15 p-values of their paper (1995, section 4.1): four are discoveries at 5 %."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344,
         0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]  # fmt: skip
    q = adjust_p_values(p)
    assert sum(value <= 0.05 for value in q) == 4
    assert q[3] == pytest.approx(0.0095 * 15 / 4)


def test_q_values_keep_the_order_they_came_in() -> None:
    assert adjust_p_values([0.04, 0.01, 1.0, 0.02]) == pytest.approx((0.16 / 3, 0.04, 1.0, 0.04))
    assert adjust_p_values([]) == ()


@pytest.mark.parametrize("spread", [0.001, 0.02])
def test_the_screen_asks_beyond_two_per_cent_and_four_mad(spread: float) -> None:
    key = make_key()
    values = np.random.default_rng(2).normal(100.0, 100 * spread, 14)
    middle = float(np.median(values))
    limit = max(0.02 * middle, MADS * float(median_abs_deviation(values)))
    assert (limit > 0.02 * middle) == (spread == 0.02)
    nights = [{key: float(value)} for value in values]
    assert [len(screen_times(nights, {key: middle + sign * limit * 1.001})) for sign in (1, -1)] == [1, 1]
    assert [screen_times(nights, {key: middle + sign * limit * 0.999}) for sign in (1, -1)] == [(), ()]


def test_a_series_that_moves_against_a_slow_night_is_seen() -> None:
    """All are 3 % slower and one is not: the machine had a slow night, and that series became 3 % faster."""
    keys = [make_key(case=f"case{i}") for i in range(10)]
    rng = np.random.default_rng(3)
    nights = [dict.fromkeys(keys, 100 * (1 + 0.01 * rng.normal())) for _ in range(14)]
    tonight = dict.fromkeys(keys, 103.0) | {keys[4]: 99.9}
    first = screen_times(nights, tonight)[0]
    assert (first.key, first.apart, first.stands_alone) == (keys[4], True, False)


def test_a_slow_night_of_the_machine_does_not_stand_alone() -> None:
    keys = [make_key(case=f"case{i}") for i in range(10)]
    rng = np.random.default_rng(4)
    nights = [{key: 100 * (1 + 0.002 * rng.normal()) for key in keys} for _ in range(14)]
    for tonight, stands in ((104.0, False), (106.0, True)):
        suspects = screen_times(nights, dict.fromkeys(keys, tonight))
        assert len(suspects) == len(keys)
        assert {suspect.stands_alone for suspect in suspects} == {stands}


def test_with_few_nights_less_than_five_per_cent_does_not_stand_alone() -> None:
    key = make_key()
    for count, stands in ((1, False), (FEW_NIGHTS - 1, False), (FEW_NIGHTS, True)):
        (suspect,) = screen_times([{key: 100.0}] * count, {key: 104.0})
        assert suspect.stands_alone == stands
    assert screen_times([{key: 100.0}], {key: 105.1})[0].stands_alone
    assert screen_times([], {key: 100.0}) == ()


def test_ranks_and_scores_are_those_of_the_rank_sum_test() -> None:
    values = np.random.default_rng(5).normal(size=20)
    scores = _score_splits(_rank(values)[None])[0]
    for split in range(_LEAST_SIDE, 20 - _LEAST_SIDE + 1):
        u = mannwhitneyu(values[:split], values[split:]).statistic
        z = abs(u - split * (20 - split) / 2) / np.sqrt(split * (20 - split) * 21 / 12)
        assert scores[split - _LEAST_SIDE] == pytest.approx(z)
    tied = np.array([3.0, 1.0, 3.0, 2.0])
    np.testing.assert_array_equal(_rank(tied), rankdata(tied))


def test_a_step_is_found_where_it_is() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 0.5, (3, 28))
    keys = [make_key(case=name) for name in ("steady", "step", "small")]
    series = {key: list(100 + row) for key, row in zip(keys, noise, strict=True)}
    series[keys[1]] = [value + 4 * (night >= 17) for night, value in enumerate(series[keys[1]])]
    series[keys[2]] = [value + 1.5 * (night >= 14) for night, value in enumerate(series[keys[2]])]
    found = find_steps(series)
    assert set(found) == {keys[1]}  # 1.5 % is beyond doubt, too, and too small
    assert found[keys[1]].index == 17
    assert found[keys[1]].change == pytest.approx(0.04, abs=0.006)


def test_p_values_of_steady_series_are_uniform() -> None:
    """They may not be smaller than they should be: at most 5 % (here of 400, with 3 standard deviations) below 5 %."""
    from sdopt.perf.gate.drift import _find_best

    rng = np.random.default_rng(7)
    p = np.array([_find_best(rng.normal(size=24).tolist()).p_value for _ in range(400)])
    assert (p < 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert (p < 0.5).mean() == pytest.approx(0.5, abs=0.08)


def test_too_few_nights_have_no_step() -> None:
    assert find_steps({make_key(): [100.0] * 4 + [200.0] * 5}) == {}


def test_drift_is_looked_for_on_the_first_night_of_a_week() -> None:
    nights = [make_run(night, {}) for night in range(6)]  # 1 January 2026 is a Thursday
    first = [is_first_of_week(before, after) for before, after in pairwise(nights)]
    assert first == [False, False, False, True, False]
    assert not is_first_of_week(None, nights[0])
    with pytest.raises(ArtifactError, match="no date"):
        is_first_of_week(nights[0], make_run(1, {}, created_utc="yesterday"))
