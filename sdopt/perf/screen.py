"""The first look at tonight's times: which series left their usual range, so that they are worth measuring again.

The screen only asks; what it asks is confirmed (`confirm_rules`). It may therefore be sensitive. Its 4 MAD are not
scaled to standard deviations: of normal nights they are 2.7, which about one clean series in 100 exceeds, and a 3 %
slow-down still does where nights differ by 1 %. Scaled, they would be 4 standard deviations, and blind to it.

The machine as a whole is a little faster on some nights than on others. Where a night has enough series, each is
looked at a second time with the median change of all series taken out. That can only add suspects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sdopt.perf.nights import NightValues, collect, relative_change
from sdopt.perf.record import MetricKind, SeriesKey

LEAST_CHANGE = 0.02
MADS = 4.0
FEW_NIGHTS = 5
"""With fewer, a MAD says nothing (of one night it is 0): 2 % ask for a confirmation, and nothing less than 5 % may
do without one.
"""
UNCONFIRMED_CHANGE = 0.05
SHIFT_SERIES = 8
"""The median of fewer series may be the change that is looked for."""


@dataclass(frozen=True)
class Suspect:
    """A series that left its usual range. `old` and `new` are in ns; changes are parts of `old`."""

    key: SeriesKey
    old: float
    new: float
    change: float
    threshold: float
    nights: int
    plain: bool
    """Whether it did so as it was measured, and not only beside the other series."""
    apart: bool
    """Whether it did so beside the others, which tells it from a slow night of the machine."""

    @property
    def stands_alone(self) -> bool:
        """Large and well founded enough to count without a confirmation, on two nights in a row."""
        enough = self.nights >= FEW_NIGHTS or abs(self.change) > UNCONFIRMED_CHANGE
        return self.plain and enough


def screen_times(nights: Sequence[NightValues], tonight: NightValues) -> tuple[Suspect, ...]:
    """Those of tonight's series that differ from the median of the nights by more than 2 % and 4 MAD.

    In the order in which machine time should be spent: those that moved apart from the others first, then by how far
    they are out of their range.
    """
    times = {key: value for key, value in tonight.items() if key.metric.kind is MetricKind.TIME}
    plain = _find_outside(nights, times)
    usual = {key: median(before) for key in times if (before := collect(nights, key))}
    shifts = [_find_shift(usual, values) for values in (*nights, times)]
    apart = plain
    if all(shift is not None for shift in shifts):
        even = [_divide(values, shift or 1.0) for values, shift in zip((*nights, times), shifts, strict=True)]
        apart = _find_outside(even[:-1], even[-1])
    suspects = [
        _make_suspect(key, plain.get(key), apart.get(key), collect(nights, key), times[key])
        for key in sorted(plain.keys() | apart.keys(), key=str)
    ]
    return tuple(sorted(suspects, key=lambda s: (not s.apart, -abs(s.change) / s.threshold)))


def _make_suspect(
    key: SeriesKey, plain: float | None, apart: float | None, before: Sequence[float], new: float
) -> Suspect:
    old = median(before)
    threshold = plain if plain is not None else apart
    return Suspect(
        key, old, new, relative_change(old, new), threshold or LEAST_CHANGE, len(before),
        plain is not None, apart is not None,
    )  # fmt: skip


def _find_outside(nights: Sequence[NightValues], tonight: NightValues) -> dict[SeriesKey, float]:
    """By series that is outside of its range, the threshold that it exceeded."""
    found = {}
    for key, new in tonight.items():
        before = collect(nights, key)
        if not before:
            continue
        old = median(before)
        mad = median(abs(value - old) for value in before)
        threshold = max(LEAST_CHANGE, MADS * mad / old if old else 0.0)
        if abs(relative_change(old, new)) > threshold:
            found[key] = threshold
    return found


def _find_shift(usual: NightValues, values: NightValues) -> float | None:
    """By what factor a night's series are slower than usual, in the median; None with too few of them."""
    factors = [values[key] / old for key, old in usual.items() if old and values.get(key, 0.0) > 0]
    return median(factors) if len(factors) >= SHIFT_SERIES else None


def _divide(values: NightValues, by: float) -> dict[SeriesKey, float]:
    return {key: value / by for key, value in values.items() if key.metric.kind is MetricKind.TIME}
