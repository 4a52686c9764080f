"""Statistics, derived from raw samples when they are shown and never stored.

The unit is the process: samples of one process share its memory layout, its threads' places and the minute in which it
ran, so twenty of them say less than twenty processes would. Intervals and verdicts here never count them as if they
were apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_SEED = 20260101
_CONFIDENCE = 0.95
# Smaller differences are called none: another layout of the same code in memory makes as much.
LEAST_EFFECT = 0.02
# Of one candidate's pooled samples; above it, a median of ten says less than half of the least effect.
NOISY_CV = 0.025
# Numbers of one step of the bootstrap: 32 MB.
_CHUNK = 4_000_000

Groups = Sequence[Sequence[float]]
"""Samples in ns (or any one unit), one group for each process."""


@dataclass(frozen=True)
class Summary:
    """Of pooled samples, in ns: percentiles between neighbours are interpolated.

    `median_low_ns` and `median_high_ns` bound the median with a confidence of 95 % (hierarchical bootstrap).
    """

    count: int
    min_ns: float
    median_ns: float
    p90_ns: float
    p95_ns: float
    p99_ns: float
    max_ns: float
    mean_ns: float
    variation: float
    """Coefficient of variation: standard deviation over mean; 0 for a single sample."""
    median_low_ns: float
    median_high_ns: float

    @property
    def p50_ns(self) -> float:
        return self.median_ns

    @property
    def is_noisy(self) -> bool:
        return self.variation > NOISY_CV


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, by medians, with an interval of 95 %."""

    value: float
    low: float
    high: float


class Speed(StrEnum):
    FASTER = "faster"
    SLOWER = "slower"
    NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class PairVerdict:
    """What may be said of two candidates. `reason` is a phrase that says why, for all three."""

    speed: Speed
    ratio: Ratio
    p_value: float
    """The larger of the rank test's and the process means' test: small only where both are, fit for a correction over
    many pairs. 1 where either side has fewer than two processes."""
    reason: str


@dataclass(frozen=True)
class StepFit:
    """A line through the time of a call by its number of steps: what a call costs without any, and what each adds.

    The interval of `per_step_ns` is of 95 %, from the scatter around the line; equal to it where two points leave none.
    """

    fixed_ns: float
    per_step_ns: float
    per_step_low_ns: float
    per_step_high_ns: float
    residual_ns: float
    """Root mean square of what the line leaves."""


def summarize(groups: Groups) -> Summary | None:
    """None where there is no sample."""
    pooled = _pool(groups)
    if not pooled.size:
        return None
    median, p90, p95, p99 = np.percentile(pooled, (50, 90, 95, 99))
    low, high = np.percentile(_resample_medians(groups, np.random.default_rng(_SEED)), _bounds())
    mean = float(pooled.mean())
    deviation = float(pooled.std(ddof=1)) if pooled.size > 1 else 0.0
    return Summary(
        int(pooled.size), float(pooled.min()), float(median), float(p90), float(p95), float(p99), float(pooled.max()),
        mean, deviation / mean if mean else 0.0, float(low), float(high),
    )  # fmt: skip


def compare_speed(baseline: Groups, candidate: Groups) -> Ratio | None:
    """How many times as fast the candidate is: median of the baseline over that of the candidate.

    The interval is the wider of two. The bootstrap resamples processes first and their samples second; with two or
    three processes it cannot show more spread than they happened to have. Welch's interval on the logarithms of the
    processes' medians makes up for that, by Student's t, and needs two processes of each. With one process each it is
    the spread within them, and no more. None where either has no sample.
    """
    if not (any(map(len, baseline)) and any(map(len, candidate))):
        return None
    value = float(np.median(_pool(baseline)) / np.median(_pool(candidate)))
    rng = np.random.default_rng(_SEED)
    low, high = np.percentile(_resample_medians(baseline, rng) / _resample_medians(candidate, rng), _bounds())
    bounds = [value, float(low), float(high)]
    if (welch := _compare_processes(baseline, candidate)) is not None:
        bounds += [welch.low, welch.high]
    return Ratio(value, min(bounds), max(bounds))


def judge_pair(baseline: Groups, candidate: Groups) -> PairVerdict | None:
    """Whether the candidate is faster or slower than the baseline, or there is no difference that can be told.

    All three have to say so: the rank test of Mann and Whitney on all samples, the interval of `compare_speed`, which
    leaves out 1, and a ratio of at least 2 %. The rank test takes samples of one process as independent, and alone
    would find a difference wherever two processes differ; the interval is what holds it back. With fewer than two
    processes of either nothing is known of how processes differ, and there is no difference. None where either has no
    sample.
    """
    ratio = compare_speed(baseline, candidate)
    if ratio is None:
        return None
    welch = _compare_processes(baseline, candidate)
    if welch is None:
        return PairVerdict(
            Speed.NO_DIFFERENCE, ratio, 1.0, "one process of either does not say how processes differ: measure two"
        )
    p_value = max(_rank_test(baseline, candidate), welch.p_value)
    if ratio.low <= 1 <= ratio.high:
        reason = f"the interval {ratio.low:.3f} to {ratio.high:.3f} holds 1"
    elif p_value >= 1 - _CONFIDENCE:
        reason = f"the rank test does not tell them apart (p {p_value:.2f})"
    elif max(ratio.value, 1 / ratio.value) < 1 + LEAST_EFFECT:
        reason = f"the medians differ by less than {LEAST_EFFECT:.0%}"
    else:
        speed = Speed.FASTER if ratio.value > 1 else Speed.SLOWER
        return PairVerdict(speed, ratio, p_value, f"rank test, interval and effect agree (p {p_value:.2g})")
    return PairVerdict(Speed.NO_DIFFERENCE, ratio, p_value, reason)


def fit_steps(sweep: Mapping[int, Sequence[float]]) -> StepFit | None:
    """Least squares through end-to-end samples in ns by number of steps. None below two numbers of steps.

    Each sample counts in inverse proportion to its square, so that the relative error is what is made small: noise
    grows with the time it disturbs.
    """
    points = [(steps, sample) for steps, samples in sweep.items() for sample in samples if sample > 0]
    if len({steps for steps, _ in points}) < 2:
        return None
    steps, times = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    design = np.stack([np.ones_like(steps), steps], axis=1) / times[:, None]
    solution, *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    fixed_ns, per_step_ns = map(float, solution)
    half_ns = 0.0
    if (freedom := len(points) - 2) > 0:
        from scipy.stats import t as student

        scatter = float(np.sum((design @ solution - 1) ** 2)) / freedom
        variance = scatter * float(np.linalg.inv(design.T @ design)[1, 1])
        half_ns = float(student.ppf(0.5 + _CONFIDENCE / 2, freedom)) * math.sqrt(max(0.0, variance))
    left_ns = times - (fixed_ns + per_step_ns * steps)
    residual_ns = float(np.sqrt(np.mean(left_ns**2)))
    return StepFit(fixed_ns, per_step_ns, per_step_ns - half_ns, per_step_ns + half_ns, residual_ns)


@dataclass(frozen=True)
class _Welch:
    """The ratio's interval and p-value from processes' medians alone."""

    low: float
    high: float
    p_value: float


def _compare_processes(baseline: Groups, candidate: Groups) -> _Welch | None:
    """Welch's test on the logarithms of the processes' medians; None below two processes of either.

    Their variances are not pooled: torch.compile's processes do not scatter as an engine's do.
    """
    logs = [np.log([np.median(group) for group in groups if len(group)]) for groups in (baseline, candidate)]
    if min(values.size for values in logs) < 2:
        return None
    if not any(map(np.ptp, logs)):  # no process differs from another: only planted samples are so
        ratio = math.exp(logs[0][0] - logs[1][0])
        return _Welch(ratio, ratio, 1.0 if ratio == 1.0 else 0.0)
    from scipy.stats import ttest_ind

    # scipy warns of lost digits where the processes of one side do not differ; their variance is 0 all the same.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        test = ttest_ind(*logs, equal_var=False)
    interval = test.confidence_interval(_CONFIDENCE)
    return _Welch(math.exp(interval.low), math.exp(interval.high), float(test.pvalue))


def _rank_test(baseline: Groups, candidate: Groups) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(_pool(baseline), _pool(candidate), alternative="two-sided").pvalue)


def _bounds() -> tuple[float, float]:
    return 50 * (1 - _CONFIDENCE), 50 * (1 + _CONFIDENCE)


def _pool(groups: Groups) -> NDArray[np.float64]:
    return np.array([sample for group in groups for sample in group], dtype=np.float64)


def _resample_medians(groups: Groups, rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of as many processes drawn with replacement, and of each as many of its samples."""
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    sizes = np.array([array.size for array in arrays])
    table = np.zeros((len(arrays), sizes.max()))
    for row, array in zip(table, arrays, strict=True):
        row[: array.size] = array
    rows = max(1, _CHUNK // (len(arrays) * int(sizes.max())))
    parts = [_draw_medians(table, sizes, rng, min(rows, _RESAMPLES - start)) for start in range(0, _RESAMPLES, rows)]
    return np.concatenate(parts)


def _draw_medians(
    table: NDArray[np.float64], sizes: NDArray[np.int64], rng: np.random.Generator, count: int
) -> NDArray[np.float64]:
    """`count` medians. `table` has a row for each process, filled up behind its `sizes`."""
    chosen = rng.integers(len(sizes), size=(count, len(sizes)))
    taken = sizes[chosen]
    places = (rng.random((count, len(sizes), table.shape[1])) * taken[..., None]).astype(np.int64)
    drawn = table[chosen[..., None], places]
    # A shorter process has fewer samples to draw: what is too many sorts behind all that count.
    drawn[np.arange(table.shape[1]) >= taken[..., None]] = np.inf
    drawn = np.sort(drawn.reshape(count, -1), axis=1)
    totals, lines = taken.sum(axis=1), np.arange(count)
    return np.asarray((drawn[lines, (totals - 1) // 2] + drawn[lines, totals // 2]) / 2)
