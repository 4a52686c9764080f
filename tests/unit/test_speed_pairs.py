"""Times taken by turns: what is really faster is found, noise is not, and no clock of this machine is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator

import sdopt.convert.blocks.turns as speed
from sdopt.convert.blocks.turns import compare_pairs, take_turns

Noise = Callable[[Generator, int], np.ndarray]
# Of one run's time. A pause of the machine is rare and long; a second mode is a clock that changes.
NOISES: dict[str, Noise] = {
    "normal": lambda rng, n: rng.normal(1, 0.1, n),
    "lognormal": lambda rng, n: rng.lognormal(0, 0.5, n),
    "pauses": lambda rng, n: 1 + 0.02 * rng.random(n) + 4 * (rng.random(n) < 0.1),
    "two clocks": lambda rng, n: rng.choice([1.0, 1.7], n) * rng.normal(1, 0.01, n),
}


def as_ns(seconds: np.ndarray) -> list[int]:
    return [int(value) for value in np.maximum(seconds, 1e-3) * 1e9]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("pairs", [6, 7, 11, 40])
def test_the_interval_holds_the_true_ratio_95_times_of_100(noise: str, pairs: int) -> None:
    rng, ratio, trials = np.random.default_rng(pairs), 1.3, 500
    hits = 0
    for _ in range(trials):
        b, a = (NOISES[noise](rng, pairs) for _ in "ab")
        found = compare_pairs(as_ns(a * ratio), as_ns(b))
        hits += found.low <= ratio <= found.high
        assert found.low <= found.value <= found.high
    # Four standard errors below 95 %: these draws are the same each time.
    assert hits / trials > 0.95 - 4 * (0.95 * 0.05 / trials) ** 0.5


@pytest.mark.parametrize("pairs", [10, 20, 40])
def test_the_interval_is_no_wider_than_it_has_to_be(pairs: int) -> None:
    """One rank further in, and it would hold the median less than 95 times of 100."""
    ordered = list(range(1, pairs + 1))
    found = compare_pairs(ordered, [1] * pairs)
    rank = ordered.index(int(found.low))
    assert found.high == pairs - rank, "as many are left out above as below"
    heads = np.random.default_rng(0).binomial(pairs, 0.5, 200_000)
    inside = float(np.mean((heads > rank) & (heads < pairs - rank)))
    narrower = float(np.mean((heads > rank + 1) & (heads < pairs - rank - 1)))
    assert narrower < 0.95 < inside + 0.002


@pytest.mark.parametrize(("pairs", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (40, 14)])
def test_the_interval_leaves_out_the_ranks_of_published_tables(pairs: int, rank: int) -> None:
    """Distribution-free 95 % intervals of a median end at these ranks: Conover, Practical Nonparametric Statistics."""
    found = compare_pairs(list(range(1, pairs + 1)), [1] * pairs)
    assert (found.low, found.high) == (rank, pairs + 1 - rank)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)), min_size=6, max_size=40), st.integers(1, 50))
def test_what_slows_a_pair_slows_both_and_changes_nothing(pairs: list[tuple[int, int]], factor: int) -> None:
    a, b = (list(each) for each in zip(*pairs, strict=True))
    steady = compare_pairs(a, b)
    drift = [factor + index * factor for index in range(len(pairs))]
    a, b = ([value * times for value, times in zip(each, drift, strict=True)] for each in (a, b))
    drifted = compare_pairs(a, b)
    assert (drifted.value, drifted.low, drifted.high) == pytest.approx((steady.value, steady.low, steady.high))


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=6, max_size=40))
def test_the_other_way_round_is_the_inverse(pairs: list[tuple[int, int]]) -> None:
    a, b = (list(each) for each in zip(*pairs, strict=True))
    there, back = compare_pairs(a, b), compare_pairs(b, a)
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low))


@pytest.mark.parametrize("noise", NOISES)
def test_twice_as_fast_is_found_and_equal_is_not_called_faster(noise: str) -> None:
    rng = np.random.default_rng(7)
    found = compare_pairs(as_ns(2 * NOISES[noise](rng, 40)), as_ns(NOISES[noise](rng, 40)))
    assert found.low > 1.1
    assert found.low < 2 < found.high
    faster = sum(
        compare_pairs(as_ns(NOISES[noise](rng, 40)), as_ns(NOISES[noise](rng, 40))).low > 1 for _ in range(400)
    )
    assert faster <= 0.025 * 400 + 4 * (0.025 * 0.975 * 400) ** 0.5


def test_one_pause_of_the_machine_does_not_decide() -> None:
    a, b = [1_000_000] * 10, [900_000] * 10
    b[3] = 3_600_000_000_000
    found = compare_pairs(a, b)
    assert found.value == found.high == pytest.approx(10 / 9)
    assert found.low > 1


@pytest.mark.parametrize("pairs", [0, 1, 5])
def test_too_few_pairs_have_no_interval(pairs: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        compare_pairs([1] * pairs, [1] * pairs)


def test_pairs_are_whole() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare_pairs([1] * 7, [1] * 6)


@dataclass
class Machine:
    """Runs cost what they are said to cost, on a clock of its own. Each makes the next `slower` times as long."""

    monkeypatch: pytest.MonkeyPatch
    a_ns: int
    b_ns: int
    slower: float = 1.0
    first_ns: int = 0

    def __post_init__(self) -> None:
        self.now_ns = 0
        self.calls = ""
        self.monkeypatch.setattr(speed.time, "monotonic_ns", lambda: self.now_ns)

    def take_turns(self) -> tuple[list[int], list[int]]:
        return take_turns(lambda: self._run("a", self.a_ns), lambda: self._run("b", self.b_ns))

    def _run(self, name: str, cost_ns: int) -> None:
        first_ns = 0 if name in self.calls else self.first_ns
        self.now_ns += round(cost_ns * self.slower ** len(self.calls)) + first_ns
        self.calls += name


def test_turns_are_taken_abba(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 300, 100)
    a_ns, b_ns = machine.take_turns()
    assert machine.calls.startswith("ab" + "abba" * 3)
    assert machine.calls.count("a") == machine.calls.count("b") == len(a_ns) + 1 == len(b_ns) + 1
    assert (set(a_ns), set(b_ns)) == ({300}, {100}), "each time is its own"


def test_a_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    a_ns, b_ns = Machine(monkeypatch, 300, 100, first_ns=10**9).take_turns()
    assert (set(a_ns), set(b_ns)) == ({300}, {100})


def test_a_machine_that_gets_slower_favours_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """In AB AB AB, the second would always come out slower by one step of the drift."""
    found = compare_pairs(*Machine(monkeypatch, 10**6, 10**6, slower=1.01).take_turns())
    assert found.low < 1 < found.high
    assert found.value == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("cost_ns", "pairs"), [(10**6, speed._MOST_PAIRS), (10**9, 10), (60 * 10**9, speed._LEAST_PAIRS)]
)
def test_long_runs_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch, cost_ns: int, pairs: int) -> None:
    a_ns, b_ns = Machine(monkeypatch, cost_ns, cost_ns).take_turns()
    assert len(a_ns) == len(b_ns) == pairs
    compare_pairs(a_ns, b_ns)
