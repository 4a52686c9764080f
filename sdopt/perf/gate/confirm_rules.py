"""From suspicion to alarm: an A/B of the same night decides, and where there is none, a second night in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdopt.bench.case.stats import LEAST_EFFECT, Groups, PairVerdict, Speed, judge_pair
from sdopt.perf.gate.findings import Outcome, SuspectRecord
from sdopt.perf.gate.multiple import adjust_p_values
from sdopt.perf.gate.screen import Suspect
from sdopt.perf.history.record import SeriesKey

LEVEL = 0.02
"""Of the q-values: what `judge_pair` finds at 5 % would wake somebody for nothing once a month on a noisy machine."""
LEAN = 0.05
"""Of the p-value by itself: as much has an A/B to say where it leaves the decision to a second night."""


@dataclass(frozen=True)
class Confirmation:
    """Samples in ns of one series in both commits, grouped by process and measured in turns in the same night.

    `dirty` says why they are not to be believed; such a confirmation counts as none.
    """

    baseline: Groups
    candidate: Groups
    dirty: tuple[str, ...] = ()


Confirm = Callable[[Sequence[SeriesKey]], Mapping[SeriesKey, Confirmation] | None]
"""Measures suspects again, most important first. None where there is no machine time or the old commit cannot run; a
series that is left out had no time.
"""


def judge_suspects(
    suspects: Sequence[Suspect], confirm: Confirm | None, last_night: Mapping[SeriesKey, Suspect]
) -> tuple[SuspectRecord, ...]:
    """What became of each. `last_night` is what the screen says of the clean night before, by the same history.

    The sign of the A/B counts, not that of the screen: a machine that is faster tonight can hide a slower commit.
    """
    asked = confirm([suspect.key for suspect in suspects]) if confirm and suspects else None
    answers = {key: answer for key, answer in (asked or {}).items() if not answer.dirty}
    verdicts = {key: verdict for key, answer in answers.items() if (verdict := _judge_answer(answer))}
    q_values = adjust_p_values([verdict.p_value for verdict in verdicts.values()])
    by_key = {key: (verdict, q) for (key, verdict), q in zip(verdicts.items(), q_values, strict=True)}
    return tuple(_record_suspect(suspect, by_key.get(suspect.key), last_night.get(suspect.key)) for suspect in suspects)


def _judge_answer(answer: Confirmation) -> PairVerdict | None:
    """None where the A/B says nothing at all: no sample, or one process of either commit."""
    if min(sum(1 for group in groups if group) for groups in (answer.baseline, answer.candidate)) < 2:
        return None
    return judge_pair(answer.baseline, answer.candidate)


def _record_suspect(
    suspect: Suspect, answer: tuple[PairVerdict, float] | None, before: Suspect | None
) -> SuspectRecord:
    """An A/B that shows 2 % and more, but not beyond doubt, clears nothing: it had too few processes.

    Two nights in a row then count only where the A/B leans the same way: what it cannot tell from chance wakes nobody.
    """
    if answer is None:
        return _record_alone(suspect, before)
    verdict, q_value = answer
    figures = {"confirmed_change": 1 / verdict.ratio.value - 1, "p_value": verdict.p_value, "q_value": q_value}
    if verdict.speed is not Speed.NO_DIFFERENCE and q_value <= LEVEL:
        outcome = Outcome.SLOWER if verdict.speed is Speed.SLOWER else Outcome.FASTER
    elif max(verdict.ratio.value, 1 / verdict.ratio.value) < 1 + LEAST_EFFECT:
        outcome = Outcome.CLEARED
    else:
        leans = verdict.p_value <= LEAN and (verdict.ratio.value < 1) == (suspect.change > 0)
        record = _record_alone(suspect, before) if leans else _record(suspect, Outcome.OPEN)
        return record.model_copy(update={"p_value": verdict.p_value, "q_value": q_value})
    return _record(suspect, outcome).model_copy(update=figures)


def _record_alone(suspect: Suspect, before: Suspect | None) -> SuspectRecord:
    both = before is not None and suspect.stands_alone and before.stands_alone
    if both and before is not None and suspect.change * before.change > 0:
        return _record(suspect, Outcome.SLOWER if suspect.change > 0 else Outcome.FASTER)
    return _record(suspect, Outcome.OPEN)


def _record(suspect: Suspect, outcome: Outcome) -> SuspectRecord:
    return SuspectRecord(
        series=suspect.key, old=suspect.old, new=suspect.new, change=suspect.change, threshold=suspect.threshold,
        outcome=outcome,
    )  # fmt: skip
