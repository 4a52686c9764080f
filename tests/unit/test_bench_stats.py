"""Statistics against formulas and planted differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.bench.stats import compare_speed, summarize

GROUPS = st.lists(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), min_size=1, max_size=4)


@given(GROUPS)
def test_percentiles_are_ordered_and_within_the_samples(groups: list[list[int]]) -> None:
    summary = summarize(groups)
    assert summary is not None
    pooled = [sample for group in groups for sample in group]
    assert summary.count == len(pooled)
    assert min(pooled) == summary.min_ns <= summary.median_ns <= summary.p90_ns <= summary.p99_ns <= max(pooled)


def test_known_percentiles() -> None:
    summary = summarize([range(1, 51), range(51, 102)])
    assert summary is not None
    assert (summary.median_ns, summary.p90_ns, summary.p99_ns, summary.min_ns) == (51, 91, 100, 1)


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
