"""How often a call is repeated: until its times settle, and never past the budget of the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.bench.measure import steady as steady_module
from sdopt.bench.measure.steady import Effort, has_settled, time_calls, warm_up

S = 1_000_000_000


def play(times_ns: Iterable[int]) -> Callable[[], int]:
    """A call that takes these times in turn."""
    remaining = iter(times_ns)
    return lambda: next(remaining)


@pytest.mark.parametrize(
    ("samples", "settled"),
    [
        ([100] * 5, False),
        ([100] * 6, True),
        ([100, 100, 100, 101, 101, 101], True),
        ([100, 100, 100, 102, 102, 102], False),
        ([900, 500, 100, 100, 100, 100], False),
        ([900, 500, 100, 100, 300, 100, 100], True),
    ],
)
def test_windows_settle_by_their_medians(samples: list[int], settled: bool) -> None:
    assert has_settled(samples, Effort()) is settled


def test_warm_up_goes_on_until_the_times_settle() -> None:
    times = [1000, 700, 500, 400, 350, 330, *[300] * 20]
    found = warm_up(play(times), (), 0, Effort(picture_budget_s=1))
    assert list(found) == times[:11]
    assert has_settled(found, Effort())


def test_warm_up_gives_up_on_times_that_never_settle() -> None:
    found = warm_up(play(2**n for n in range(99)), (), 0, Effort(most_warm_up=8, picture_budget_s=1e9))
    assert len(found) == 8
    assert not has_settled(found, Effort())


def test_no_call_is_begun_that_would_leave_the_budget() -> None:
    def fail() -> int:
        raise AssertionError("a picture of a minute was drawn as warm-up")

    effort = Effort(picture_budget_s=3)
    assert warm_up(fail, (), 60 * S, effort) == ()
    assert warm_up(fail, (60 * S,), 0, effort) == (60 * S,)
    assert warm_up(play([S, 2 * S, 2 * S, 9 * S]), (), 0, effort) == (S, 2 * S)


@given(st.lists(st.integers(1, 10**10), min_size=40, max_size=40), st.floats(0.1, 50), st.integers(1, 5))
def test_warm_up_is_bounded(times: list[int], budget_s: float, window: int) -> None:
    effort = Effort(picture_budget_s=budget_s, settle_window=window)
    found = warm_up(play(times), (), times[0], effort)
    assert len(found) <= effort.most_warm_up
    # The last call may take longer than the one before it, which was all that could be known.
    assert sum(found[:-1]) <= budget_s * S
    if len(found) > 2 * window:
        assert not has_settled(found[:-1], effort)


class PlantedMeter:
    name = "rapl"

    def start(self) -> None:
        self.started = True

    def read_j(self) -> float:
        return 12.0 if self.started else 0.0


def test_calls_are_counted_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr(steady_module, "open_meter", lambda uuid: contextlib.nullcontext(PlantedMeter()))
    shares: list[float] = []

    def count(times: list[int]) -> tuple[int, ...]:
        return time_calls(play(times), Effort(), None, shares.append).samples_ns

    assert count([S] * 20) == (S,) * 4  # the first that passes three seconds is the last
    assert count([60 * S] * 20) == (60 * S,) * 2
    assert count([1] * 20) == (1,) * 10
    assert shares[:4] == [0.0, 0.1, 0.2, 0.3]
    steady = time_calls(play([S] * 20), Effort(), None, shares.append)
    assert (steady.energy_j, steady.energy_source) == (3.0, "rapl")
