"""Repeat a call until its times can be believed: first as warm-up, until they settle, then counted.

What a call is, its caller says: a picture, or one step of the UNet. Both phases have a budget of time, so that a
network that takes a minute for a call is not run for an hour.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdopt.bench.case.report import Conditions
from sdopt.bench.measure.conditions import watch_conditions
from sdopt.bench.measure.energy import open_meter


@dataclass(frozen=True)
class Effort:
    """How often to call. The budget holds for warm-up and counted calls each; the least number of calls is counted
    whatever it costs.

    The tolerance is the least effect that a verdict tells: a warm-up that still moves the median by less changes none.
    A window of three bears one call that something disturbed.
    """

    least_pictures: int = 2
    most_pictures: int = 10
    picture_budget_s: float = 3.0
    settle_window: int = 3
    settle_tolerance: float = 0.02
    most_warm_up: int = 20

    @property
    def budget_ns(self) -> float:
        return self.picture_budget_s * 1e9


@dataclass(frozen=True)
class Steady:
    """What was seen beside the samples while calls were counted; `energy_j` is of one call."""

    samples_ns: tuple[int, ...]
    energy_j: float | None
    energy_source: str
    conditions: Conditions


def has_settled(samples_ns: Sequence[int], effort: Effort) -> bool:
    """Whether the medians of the last two windows are as good as equal; False where there are not yet two."""
    window = effort.settle_window
    if len(samples_ns) < 2 * window:
        return False
    before = statistics.median(samples_ns[-2 * window : -window])
    return abs(statistics.median(samples_ns[-window:]) - before) < effort.settle_tolerance * before


def warm_up(run: Callable[[], int], done_ns: Sequence[int], expected_ns: float, effort: Effort) -> tuple[int, ...]:
    """Call until the times settle, and return them behind `done_ns`, those of calls after the cold start.

    `run` returns its time in ns. No call is begun that would leave the budget, by the time of the call before it or,
    for the first, by `expected_ns`. Whether it settled, `has_settled` says of what is returned.
    """
    samples_ns, spent_ns = list(done_ns), 0
    while not has_settled(samples_ns, effort) and len(samples_ns) < effort.most_warm_up:
        if spent_ns + (samples_ns[-1] if samples_ns else expected_ns) > effort.budget_ns:
            break
        samples_ns.append(run())
        spent_ns += samples_ns[-1]
    return tuple(samples_ns)


def time_calls(run: Callable[[], int], effort: Effort, gpu_uuid: str | None, tell: Callable[[float], None]) -> Steady:
    """Count calls until the budget is spent, `least_pictures` to `most_pictures`. `tell` gets the share done."""
    samples_ns: list[int] = []
    with open_meter(gpu_uuid) as meter, watch_conditions(gpu_uuid) as watch:
        if meter is not None:
            meter.start()
        while _goes_on(samples_ns, effort):
            tell(len(samples_ns) / effort.most_pictures)
            samples_ns.append(run())
            watch.end_call()
        used_j = None if meter is None else meter.read_j()
        return Steady(
            tuple(samples_ns), None if used_j is None else used_j / len(samples_ns),
            "" if meter is None or used_j is None else meter.name, watch.describe(),
        )  # fmt: skip


def _goes_on(samples_ns: Sequence[int], effort: Effort) -> bool:
    if len(samples_ns) < effort.least_pictures:
        return True
    return len(samples_ns) < effort.most_pictures and sum(samples_ns) <= effort.budget_ns
