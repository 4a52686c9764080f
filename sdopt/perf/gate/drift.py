"""Slow drift: a little every night, which no single night shows. Once a week the best single step is looked for.

A line that rises is not a step, but its two halves differ by half of its rise, which is what is found. The statistic
uses ranks, so one slow night more or less means nothing and one null distribution serves every series of a length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

from sdopt.errors import ArtifactError
from sdopt.perf.gate.multiple import adjust_p_values
from sdopt.perf.history.nights import relative_change
from sdopt.perf.history.record import RunRecord, SeriesKey

WEEKS = 8
LEAST_STEP = 0.02
LEVEL = 0.05
_LEAST_SIDE = 5
_PERMUTATIONS = 9999
_SEED = 20260101


@dataclass(frozen=True)
class Step:
    """The best single step of a series: before `index` its median is `old`, from there on `new`, in its unit."""

    index: int
    old: float
    new: float
    p_value: float
    q_value: float

    @property
    def change(self) -> float:
        return relative_change(self.old, self.new)


def is_first_of_week(last: RunRecord | None, tonight: RunRecord) -> bool:
    """Whether no clean night of this ISO week was before: that night looks for drift. No state is kept but the history.

    Raises `ArtifactError` for a date that cannot be read.
    """
    return last is not None and _week_of(last) != _week_of(tonight)


def find_steps(series: Mapping[SeriesKey, Sequence[float]]) -> dict[SeriesKey, Step]:
    """The steps of at least 2 % that are beyond doubt, Benjamini-Hochberg over all series; values oldest first."""
    keys = [key for key, values in series.items() if len(values) >= 2 * _LEAST_SIDE]
    steps = [_find_best(series[key]) for key in keys]
    q_values = adjust_p_values([step.p_value for step in steps])
    found = {
        key: Step(step.index, step.old, step.new, step.p_value, q)
        for key, step, q in zip(keys, steps, q_values, strict=True)
    }
    return {key: step for key, step in found.items() if step.q_value <= LEVEL and abs(step.change) >= LEAST_STEP}


def _find_best(values: Sequence[float]) -> Step:
    array = np.asarray(values, dtype=np.float64)
    scores = _score_splits(_rank(array)[None])[0]
    best = int(np.argmax(scores))
    null = _draw_null(len(values))
    p_value = (1 + int(np.count_nonzero(null >= scores[best] - 1e-9))) / (1 + null.size)
    index = best + _LEAST_SIDE
    return Step(index, median(values[:index]), median(values[index:]), p_value, 1.0)


def _score_splits(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardised rank sums of every split with five nights on each side: (rows, nights) -> (rows, splits).

    Pettitt 1979, divided by the standard deviation of each split, so that a recent step is not at a disadvantage.
    """
    nights = ranks.shape[1]
    before = np.arange(1, nights)
    sums = np.cumsum(ranks, axis=1)[:, :-1] - before * (nights + 1) / 2
    scores = np.abs(sums) / np.sqrt(before * (nights - before) * (nights + 1) / 12)
    return np.asarray(scores[:, _LEAST_SIDE - 1 : nights - _LEAST_SIDE])


@lru_cache(maxsize=64)
def _draw_null(nights: int) -> NDArray[np.float64]:
    """The best score of nights in random order, sampled: it depends on how many there are, and on nothing else."""
    rng = np.random.default_rng((_SEED, nights))
    orders = rng.permuted(np.tile(np.arange(1.0, nights + 1), (_PERMUTATIONS, 1)), axis=1)
    return np.asarray(_score_splits(orders).max(axis=1))


def _rank(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def _week_of(record: RunRecord) -> tuple[int, int]:
    try:
        year, week, _ = datetime.fromisoformat(record.created_utc).isocalendar()
    except ValueError as error:
        raise ArtifactError(f"run {record.id} has no date that can be read: {record.created_utc!r}") from error
    return year, week
