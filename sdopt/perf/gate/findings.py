"""What the gate found in a night: `GateReport`, one `Finding` for each thing that a person should look at."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sdopt.perf.history.record import SeriesKey

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # Equal pictures have an infinite PSNR, which JSON has no number for.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Rule(StrEnum):
    """Why it alarmed, the most pressing first."""

    FAILED = "failed"
    MISSING = "missing"
    FIDELITY = "fidelity"
    SLOWER = "slower"
    DRIFT = "drift"
    MEMORY = "memory"
    SIZE = "size"
    BUILD = "build"
    BLIND = "blind"
    """Too many dirty nights in a row: nobody is watching the times."""
    IMPROVED = "improved"
    """Better by more than 5 %: welcome, or a sign that work was lost."""


class Evidence(StrEnum):
    """What an alarm rests on."""

    VALUE = "the figure itself"
    SAME_NIGHT = "A/B in the same night"
    TWO_NIGHTS = "two nights in a row"
    WEEKS = "the nights of some weeks"


class Outcome(StrEnum):
    """What became of a suspect."""

    SLOWER = "slower"
    FASTER = "faster"
    CLEARED = "no difference"
    """The A/B of the same night shows less than 2 %."""
    OPEN = "open"
    """No A/B, or one that leaves doubt: it counts if it is there again tomorrow."""


class Finding(_Record):
    """`old`, `new` are in the metric's unit. `change` is a part of `old`, for fidelity a difference."""

    rule: Rule
    series: SeriesKey | None
    """None where it is about a candidate or the whole night."""
    sentence: str
    evidence: Evidence = Evidence.VALUE
    old: float | None = None
    new: float | None = None
    change: float | None = None
    p_value: float | None = None
    q_value: float | None = None
    """After Benjamini-Hochberg over all that was tested with it."""


class SuspectRecord(_Record):
    """A series that the screen found outside of its range, in ns and parts of `old`, and what became of it."""

    series: SeriesKey
    old: float
    new: float
    change: float
    threshold: float
    outcome: Outcome
    confirmed_change: float | None = None
    """By the A/B, where there was one."""
    p_value: float | None = None
    q_value: float | None = None


class GateReport(_Record):
    """The judgement of one run. An improvement alarms, too: somebody has to look at it and accept it."""

    schema_version: Literal[1] = 1
    run: str
    commit: str
    last_good_run: str
    """Empty where there is none."""
    last_good_commit: str
    nights: int
    """How many nights the times were held against."""
    screened: int
    """How many series of times."""
    looked_for_drift: bool
    suspects: tuple[SuspectRecord, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = Field(default=())
    """What was not judged, and why."""
    times_judged: bool = True

    @property
    def verdict(self) -> Literal["pass", "alarm"]:
        return "alarm" if self.findings else "pass"

    @property
    def exit_code(self) -> Literal[0, 3]:
        return 3 if self.findings else 0

    @property
    def recorded_verdict(self) -> Literal["", "pass", "alarm"]:
        """For `RunRecord.verdict`: empty for a night of dirty times or of an open suspicion, which proves no commit."""
        undecided = not self.times_judged or any(suspect.outcome is Outcome.OPEN for suspect in self.suspects)
        return "" if undecided and not self.findings else self.verdict

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()
