"""Statistics, derived from raw samples when they are shown and never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_SEED = 20260101

Groups = Sequence[Sequence[int]]
"""Samples in ns, one group for each process."""


@dataclass(frozen=True)
class Summary:
    """Of pooled samples, in ns: percentiles between neighbours are interpolated."""

    count: int
    min_ns: float
    median_ns: float
    p90_ns: float
    p99_ns: float


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, by medians, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def summarize(groups: Groups) -> Summary | None:
    """None where there is no sample."""
    pooled = np.array([sample for group in groups for sample in group], dtype=np.float64)
    if not pooled.size:
        return None
    median, p90, p99 = np.percentile(pooled, (50, 90, 99))
    return Summary(int(pooled.size), float(pooled.min()), float(median), float(p90), float(p99))


def compare_speed(baseline: Groups, candidate: Groups) -> Ratio | None:
    """How many times as fast the candidate is: median of the baseline over that of the candidate.

    The interval resamples processes first and their samples second, because samples of one process are more
    alike than those of two; with one process each it is the spread within them, and no more.
    """
    if not (any(baseline) and any(candidate)):
        return None
    rng = np.random.default_rng(_SEED)
    ratios = _resample_medians(baseline, rng) / _resample_medians(candidate, rng)
    low, high = np.percentile(ratios, (2.5, 97.5))
    pooled = [
        np.median(np.concatenate([np.asarray(group) for group in groups if group])) for groups in (baseline, candidate)
    ]
    return Ratio(float(pooled[0] / pooled[1]), float(low), float(high))


def _resample_medians(groups: Groups, rng: np.random.Generator) -> NDArray[np.float64]:
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if group]
    medians = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        chosen = (arrays[k] for k in rng.integers(len(arrays), size=len(arrays)))
        medians[i] = np.median(np.concatenate([rng.choice(array, size=array.size) for array in chosen]))
    return medians
