"""Which groups stay quantised, by made-up figures: what breaks, what is slow, and what is too much together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.bundle.records import SpeedupRecord
from sdopt.convert.blocks.choose import LEAST_GAIN, Measurement, Outcome, choose_groups, find_loss, harm_of
from sdopt.model.quantization import Scheme

INT8, FP8, W8, W4 = Scheme.INT8, Scheme.FP8, Scheme.INT8_WEIGHTS, Scheme.INT4_WEIGHTS
LIMIT = 0.05
SLACK_NS = 5e6


def speedup(value: float, spread: float = 0.01) -> SpeedupRecord:
    return SpeedupRecord(value=value, low=value - spread, high=value + spread)


def measured(error: float, gain: float | None = 1.1, *, slower_ns: float = 0.0, float_layers: int = 0) -> Measurement:
    return Measurement(error, None if gain is None else speedup(gain), slower_ns, float_layers)


@dataclass
class Engine:
    """An engine with groups of known figures. Together, errors are `correlation` times what independent ones give, and
    times saved add up. `asked` are the sets that were measured."""

    alone: Mapping[str, Measurement]
    correlation: float = 1.0
    together: Measurement | None = None
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, groups: tuple[str, ...]) -> Measurement:
        self.asked.append(groups)
        if len(groups) == 1:
            return self.alone[groups[0]]
        if self.together is not None:
            return self.together
        parts = [self.alone[group] for group in groups]
        error = self.correlation * math.hypot(*(part.error for part in parts))
        if any(part.speedup is None for part in parts):
            return Measurement(error)
        left = max(0.01, 1 - sum(1 - 1 / part.speedup.value for part in parts if part.speedup))
        return Measurement(error, speedup(1 / left), sum(part.slower_ns for part in parts))


def choose(engine: Engine, scheme: Scheme = INT8, *, slack_ns: float = 0.0, limit: float = LIMIT) -> Outcome:
    return choose_groups(dict.fromkeys(engine.alone, scheme), engine, error_limit=limit, slack_ns=slack_ns)


def test_what_breaks_and_what_is_slow_stays_and_the_rest_is_quantised() -> None:
    engine = Engine({
        "fine": measured(0.01), "breaks": measured(0.3), "slower": measured(0.001, 0.9), "even": measured(0.001, 0.999),
        "also fine": measured(0.02),
    })  # fmt: skip
    outcome = choose(engine)
    assert outcome.kept == ("fine", "even", "also fine"), "no slower, and half as large"
    assert outcome.groups["breaks"].reason == "error 30.0% alone, above 5.0%"
    assert outcome.groups["slower"].reason.startswith("slower: 0.90 times as fast")
    assert engine.asked[-1] == outcome.kept, "in the order of the graph, and measured together"
    assert outcome.together == engine(outcome.kept)


@pytest.mark.parametrize("error", [math.nan, math.inf, 1e30])
def test_an_output_that_is_no_number_is_out_and_said_so(error: float) -> None:
    outcome = choose(Engine({"fine": measured(0.01), "nan": measured(error, 3.0)}))
    assert outcome.kept == ("fine",)
    assert "NaN" in outcome.groups["nan"].reason
    assert len(outcome.groups["nan"].reason) < 120


@pytest.mark.parametrize("error", [math.nan, 1e30, 0.2])
def test_no_set_whose_measured_error_is_too_large_is_kept(error: float) -> None:
    """Each group is fine alone, and their sum in quadrature, too: the engine itself says otherwise."""
    engine = Engine({name: measured(0.001) for name in "abc"}, together=measured(error))
    outcome = choose(engine)
    assert len(outcome.kept) == 1, "of one group, its own measurement is that of all"
    assert [len(groups) for groups in engine.asked[3:]] == [3, 2, 1]


def test_where_the_sum_is_too_large_the_most_harm_for_its_gain_goes_first() -> None:
    engine = Engine({
        "small gain": measured(0.03, 1.03), "large gain": measured(0.03, 1.5), "little error": measured(0.005, 1.02),
        "large error": measured(0.045, 1.1),
    })  # fmt: skip
    outcome = choose(engine)
    assert outcome.kept == ("small gain", "large gain", "little error")
    assert engine.asked[4:] == [outcome.kept], "what the sum rules out is not measured"
    reason = outcome.groups["large error"].reason
    assert "5.0%" in reason
    assert "adds 4.5%" in reason


def test_correlated_errors_are_found_by_measuring() -> None:
    engine = Engine({name: measured(0.02) for name in "abcde"}, correlation=1.6)
    outcome = choose(engine)
    assert outcome.together is not None
    assert outcome.together.error <= LIMIT
    assert 1 <= len(outcome.kept) < 5
    assert engine.asked[-1] == outcome.kept


@pytest.mark.parametrize("together", [0.97, 1.0, LEAST_GAIN - 0.001])
def test_groups_that_are_together_no_faster_all_stay(together: float) -> None:
    outcome = choose(Engine({name: measured(0.001, 1.005) for name in "abc"}, together=measured(0.002, together)))
    assert outcome.kept == ()
    assert outcome.together is None
    for verdict in outcome.groups.values():
        assert verdict.reason.startswith(f"all together are not faster: {together:.2f} times")


def test_a_gain_that_may_be_none_is_none() -> None:
    uncertain = Measurement(0.01, SpeedupRecord(value=1.3, low=0.99, high=1.6))
    assert choose(Engine({"a": uncertain})).kept == ()
    assert choose(Engine({"a": replace(uncertain, speedup=SpeedupRecord(value=1.3, low=1.01, high=1.6))})).kept == (
        "a",
    )


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_layers_that_do_not_compute_in_8_bits_are_out_however_fast(scheme: Scheme) -> None:
    outcome = choose(Engine({"a": measured(0.001, 2.0, float_layers=3), "b": measured(0.001, 1.2)}), scheme)
    assert outcome.kept == ("b",)
    assert outcome.groups["a"].reason == "3 of its layers would not compute in 8 bits"


@pytest.mark.parametrize("scheme", [W8, W4])
def test_weights_alone_may_take_a_little_longer(scheme: Scheme) -> None:
    slow = {"borne": measured(0.01, 0.99, slower_ns=SLACK_NS), "slow": measured(0.01, 0.9, slower_ns=SLACK_NS + 1e5)}
    outcome = choose(Engine(slow), scheme, slack_ns=SLACK_NS)
    assert outcome.kept == ("borne",)
    assert outcome.groups["slow"].reason == "slower by 5.1 ms, of which 5.0 ms are borne"
    assert choose(Engine(slow), INT8, slack_ns=SLACK_NS).kept == (), "of what computes in 8 bits, speed is the purpose"


def test_weights_alone_that_are_together_too_slow_all_stay() -> None:
    each = measured(0.01, 0.99, slower_ns=3e6)
    outcome = choose(Engine({"a": each, "b": each}), W8, slack_ns=SLACK_NS)
    assert outcome.kept == ()
    assert all(verdict.reason == "all together are slower by 6.0 ms" for verdict in outcome.groups.values())
    assert choose(Engine({"a": each}), W8, slack_ns=SLACK_NS).kept == ("a",)


@pytest.mark.parametrize("scheme", Scheme)
def test_where_the_engine_does_not_run_error_alone_decides(scheme: Scheme) -> None:
    alone = {"a": measured(0.03, None), "b": measured(0.02, None), "c": measured(0.2, None), "d": measured(0.04, None)}
    outcome = choose(Engine(alone), scheme)
    assert outcome.kept == ("a", "b")
    assert find_loss(scheme, measured(0.01, None), 0.0) == ""


def test_no_groups_and_no_good_ones_measure_nothing_together() -> None:
    assert choose(Engine({})) == Outcome({}, None)
    engine = Engine({"a": measured(0.5), "b": measured(0.01, 0.5)})
    assert choose(engine).kept == ()
    assert engine.asked == [("a",), ("b",)]


def test_harm_is_error_in_quadrature_for_time() -> None:
    assert harm_of(measured(0.02, 1.1)) == pytest.approx(4 * harm_of(measured(0.01, 1.1)))
    assert harm_of(measured(0.02, 2.0)) < harm_of(measured(0.02, 1.1)) < harm_of(measured(0.02, 1.0)) < math.inf
    assert harm_of(measured(0.02, None)) < harm_of(measured(0.03, None))


measurements = st.builds(
    measured,
    st.one_of(st.floats(0, 0.2), st.sampled_from([math.nan, math.inf, 1e30])),
    st.one_of(st.none(), st.floats(0.5, 2.0)),
    slower_ns=st.floats(-1e7, 1e7),
    float_layers=st.sampled_from([0, 0, 0, 2]),
)


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), measurements, max_size=8), st.floats(0.5, 3.0),
    st.sampled_from(Scheme), st.floats(0.005, 0.3), st.floats(0, 1e7),
)  # fmt: skip
def test_what_is_kept_was_measured_and_bears_its_limits(
    alone: dict[str, Measurement], correlation: float, scheme: Scheme, limit: float, slack_ns: float
) -> None:
    engine = Engine(alone, correlation)
    # Some figures need a runtime, some machine has none: not both in one engine.
    if any(each.speedup is None for each in alone.values()):
        engine.alone = {name: replace(each, speedup=None) for name, each in alone.items()}
    outcome = choose(engine, scheme, slack_ns=slack_ns, limit=limit)
    assert outcome.groups.keys() == alone.keys()
    assert (outcome.together is None) == (not outcome.kept)
    for name, verdict in outcome.groups.items():
        assert verdict.measured is engine.alone[name]
        assert not verdict.reason or re.search(r"\d", verdict.reason), "a reason is a figure"
    if outcome.together is not None:
        assert engine.asked[-1] == outcome.kept
        assert outcome.together.error <= limit
        assert not find_loss(scheme, outcome.together, slack_ns)
        for name in outcome.kept:
            assert engine.alone[name].error <= limit
            assert not (scheme.quantizes_activations and engine.alone[name].float_layers)
    # One measurement for each group alone, and no more than one for each set that gets smaller.
    assert len(engine.asked) <= 2 * len(alone)
