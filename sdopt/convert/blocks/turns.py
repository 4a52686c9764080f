"""How many times as fast is B as A? From runs that took turns (ABBA), so that what slows the machine slows both."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from sdopt.bundle.records import SpeedupRecord

_CONFIDENCE = 0.95
# With 9 the interval bears one pair that something else disturbed. With 24 it lies between the 7th and the 18th ratio;
# more pairs narrow it by the square root of their number alone.
_LEAST_PAIRS, _MOST_PAIRS = 9, 24
# Pairs are run for about so long, within the bounds above.
_BUDGET_NS = 20_000_000_000


def take_turns(run_a: Callable[[], object], run_b: Callable[[], object]) -> tuple[list[int], list[int]]:
    """Wall times in ns of both, pair by pair; a first run of each is not counted."""
    start_ns = time.monotonic_ns()
    run_a()
    run_b()
    pair_ns = max(1, time.monotonic_ns() - start_ns)
    pairs = min(_MOST_PAIRS, max(_LEAST_PAIRS, _BUDGET_NS // pair_ns))
    a_ns: list[int] = []
    b_ns: list[int] = []
    for pair in range(pairs):
        turns = [(run_a, a_ns), (run_b, b_ns)]
        for run, samples in turns if pair % 2 == 0 else reversed(turns):
            start_ns = time.monotonic_ns()
            run()
            samples.append(time.monotonic_ns() - start_ns)
    return a_ns, b_ns


def compare_pairs(a_ns: Sequence[int], b_ns: Sequence[int]) -> SpeedupRecord:
    """The median of the pairs' ratios a/b, and its interval of at least 95 %.

    The interval is that of the sign test: it assumes nothing of how the ratios are spread. At least 6 pairs.
    """
    from scipy.stats import quantile_test

    ratios = [a / b for a, b in zip(a_ns, b_ns, strict=True)]
    interval = quantile_test(ratios, p=0.5).confidence_interval(_CONFIDENCE)
    assert not math.isnan(interval.low), f"{len(ratios)} pairs are too few for an interval"
    return SpeedupRecord(value=statistics.median(ratios), low=float(interval.low), high=float(interval.high))
