"""The first look at tonight's times: which series left their usual range, so that they are worth measuring again.

The screen only asks; what it asks is confirmed (`confirm_rules`). It may therefore be sensitive. Its 4 MAD are not
scaled to standard deviations: of normal nights they are 2.7, which about one clean series in 100 exceeds, and a 3 %
slow-down still does where nights differ by 1 %. Scaled, they would be 4 standard deviations, and blind to it.

The machine as a whole is a little faster on some nights than on others. Where a night has enough series, each is
looked at a second time with the median change of all series taken out, and 3 MAD are enough. That can only add
suspects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sdopt.perf.history.nights import NightValues, collect, relative_change
from sdopt.perf.history.record import MetricKind, SeriesKey

LEAST_CHANGE = 0.02
MADS = 4.0
MADS_APART = 3.0
"""Two standard deviations of what is left once the machine's own nights are taken out."""
FEW_NIGHTS = 5
"""With fewer, a MAD says nothing (of one night it is 0): 2 % ask for a confirmation, and nothing less than 5 % may
do without one.
"""
UNCONFIRMED_CHANGE = 0.05
UNCONFIRMED_MADS = 6.0
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
    """Whether it did so beside the others, by 3 MAD, which tells it from a slow night of the machine."""
    far: bool
    """The same by 4 MAD."""

    @property
    def stands_alone(self) -> bool:
        """Well founded enough to count without a confirmation, on two nights in a row.

        A slow night of the machine is not, unless it is 5 % and 6 MAD slower (four standard deviations); nor is less
        than that with few nights.
        """
        if abs(self.change) > max(UNCONFIRMED_CHANGE, UNCONFIRMED_MADS / MADS * self.threshold):
            return self.plain
        return self.nights >= FEW_NIGHTS and self.far and abs(self.change) > LEAST_CHANGE


def screen_times(nights: Sequence[NightValues], tonight: NightValues) -> tuple[Suspect, ...]:
    """Those of tonight's series that differ from the median of the nights by more than 2 % and 4 MAD.

    In the order in which machine time should be spent: those that moved apart from the others first, then by how far
    they are out of their range.
    """
    times = {key: value for key, value in tonight.items() if key.metric.kind is MetricKind.TIME}
    plain = _find_outside(nights, times, MADS)
    usual = {key: median(before) for key in times if (before := collect(nights, key))}
    shifts = [_find_shift(usual, values) for values in (*nights, times)]
    apart = far = plain
    if all(shift is not None for shift in shifts):
        even = [_divide(values, shift or 1.0) for values, shift in zip((*nights, times), shifts, strict=True)]
        apart, far = (_find_outside(even[:-1], even[-1], mads) for mads in (MADS_APART, MADS))
    suspects = []
    for key in sorted(plain.keys() | apart.keys(), key=str):
        before = collect(nights, key)
        old, new = median(before), times[key]
        threshold = plain[key] if key in plain else apart[key]
        seen = (key in plain, key in apart, key in far)
        suspects.append(Suspect(key, old, new, relative_change(old, new), threshold, len(before), *seen))
    return tuple(sorted(suspects, key=lambda s: (not s.apart, -abs(s.change) / s.threshold)))


def _find_outside(nights: Sequence[NightValues], tonight: NightValues, mads: float) -> dict[SeriesKey, float]:
    """By series that is outside of its range, the threshold that it exceeded."""
    found = {}
    for key, new in tonight.items():
        before = collect(nights, key)
        if not before:
            continue
        old = median(before)
        # The MAD of two nights is half of their difference, and would hide what the A/B is there to find.
        mad = median(abs(value - old) for value in before) if len(before) >= FEW_NIGHTS else 0.0
        threshold = max(LEAST_CHANGE, mads * mad / old if old else 0.0)
        if abs(relative_change(old, new)) > threshold:
            found[key] = threshold
    return found


def _find_shift(usual: NightValues, values: NightValues) -> float | None:
    """By what factor a night's series are slower than usual, in the median; None with too few of them."""
    factors = [values[key] / old for key, old in usual.items() if old and values.get(key, 0.0) > 0]
    return median(factors) if len(factors) >= SHIFT_SERIES else None


def _divide(values: NightValues, by: float) -> dict[SeriesKey, float]:
    return {key: value / by for key, value in values.items() if key.metric.kind is MetricKind.TIME}
