"""The gate: a night and the history before it, to a verdict. Pure but for the A/B that it may ask for.

    failures, missing series -> fidelity, memory, size, build time -> screen -> A/B or a second night -> weekly drift

A dirty night's times, build times among them, say nothing either way; the other rules hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdopt.perf.gate.confirm_rules import Confirm, judge_suspects
from sdopt.perf.gate.drift import WEEKS, find_steps, is_first_of_week
from sdopt.perf.gate.findings import Evidence, Finding, GateReport, Outcome, Rule, SuspectRecord
from sdopt.perf.gate.gate_limits import IMPROVED_CHANGE, check_limits, find_failures, find_missing
from sdopt.perf.gate.screen import Suspect, screen_times
from sdopt.perf.history.nights import (
    NightValues,
    collect,
    find_complete,
    find_last_good,
    is_accepted,
    same_series,
    select_nights,
    take_values,
)
from sdopt.perf.history.record import MetricKind, RunKind, RunRecord, SeriesKey

BLIND_NIGHTS = 3
"""One dirty night is a neighbour, two are bad luck; after the third nobody has watched the times for half a week."""
_KINDS_OF_TIME = (MetricKind.TIME, MetricKind.START, MetricKind.BUILD)


def judge_night(records: Sequence[RunRecord], tonight: RunRecord, confirm: Confirm | None) -> GateReport:
    """Judge a run by the runs before it (in their order; those of other series are passed over).

    `confirm` is called at most once, with at least one series, and not on a dirty night. Raises `ArtifactError` for a
    run whose date cannot be read, and what `confirm` raises.
    """
    before = [record for record in records if record.id != tonight.id]
    good = find_last_good(before, tonight)
    values = take_values(tonight)
    nights = select_nights(before, tonight, clean=True)
    complete = find_complete(before, tonight)
    findings = find_failures(complete, tonight)
    findings += find_missing(take_values(complete) if complete else (), values, tonight)
    findings += _check_figures(before, tonight, values, nights)
    suspects: tuple[SuspectRecord, ...] = ()
    weekly = False
    if tonight.dirty:
        findings += _find_blindness(before, tonight)
    else:
        last = _find_last_clean(before, tonight)
        suspects = _judge_times(before, last, values, nights, confirm)
        findings += [finding for suspect in suspects if (finding := _to_finding(suspect))]
        weekly = is_first_of_week(last, tonight)
        if weekly:
            findings += _find_drift(before, tonight, values, {f.series for f in findings if f.series})
    order = list(Rule)
    return GateReport(
        run=tonight.id, commit=tonight.commit, last_good_run=good.id if good else "",
        last_good_commit=good.commit if good else "", nights=len(nights),
        screened=0 if tonight.dirty else _count_screened(nights, values), looked_for_drift=weekly, suspects=suspects,
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.rule))),
        notes=tuple(_describe_gaps(before, tonight, nights, suspects)), times_judged=not tonight.dirty,
    )  # fmt: skip


def _check_figures(
    before: Sequence[RunRecord], tonight: RunRecord, values: NightValues, clean: Sequence[NightValues]
) -> list[Finding]:
    """Neighbours change how long a build takes, and nothing else of these."""
    builds = {key: value for key, value in values.items() if key.metric.kind is MetricKind.BUILD}
    others = {key: value for key, value in values.items() if key.metric.kind not in _KINDS_OF_TIME}
    findings = list(check_limits(select_nights(before, tonight, clean=False), others))
    return findings if tonight.dirty else findings + list(check_limits(clean, builds))


def _judge_times(
    before: Sequence[RunRecord],
    last: RunRecord | None,
    values: NightValues,
    nights: Sequence[NightValues],
    confirm: Confirm | None,
) -> tuple[SuspectRecord, ...]:
    """`last` is the clean night before: of two nights in a row, both are held against those before them.

    Where that night passed, its suspects were cleared; where it alarmed, it is none of the nights.
    """
    doubtful: dict[SeriesKey, Suspect] = {}
    if last is not None and last.verdict != "pass":
        earlier = before[: next(index for index, record in enumerate(before) if record.id == last.id)]
        past = screen_times(select_nights(earlier, last, clean=True), take_values(last))
        doubtful = {suspect.key: suspect for suspect in past}
        if last.verdict != "alarm":
            nights = [*nights[:-1], {key: value for key, value in nights[-1].items() if key not in doubtful}]
    return judge_suspects(screen_times(nights, values), confirm, doubtful)


def _find_last_clean(before: Sequence[RunRecord], tonight: RunRecord) -> RunRecord | None:
    runs = (r for r in reversed(same_series(before, tonight)) if not r.dirty)
    return next((run for run in runs if run.kind is not RunKind.MANUAL or is_accepted(run)), None)


def _find_drift(
    before: Sequence[RunRecord], tonight: RunRecord, values: NightValues, known: Iterable[SeriesKey]
) -> list[Finding]:
    nights = [*select_nights(before, tonight, clean=True, most=7 * WEEKS - 1), values]
    keys = [key for key in values if key.metric.kind is MetricKind.TIME and key not in set(known)]
    findings = []
    for key, step in find_steps({key: collect(nights, key) for key in keys}).items():
        if -IMPROVED_CHANGE <= step.change < 0:
            continue
        after = len(collect(nights, key)) - step.index
        findings.append(
            Finding(
                rule=Rule.DRIFT if step.change > 0 else Rule.IMPROVED, series=key, evidence=Evidence.WEEKS,
                old=step.old, new=step.new, change=step.change, p_value=step.p_value, q_value=step.q_value,
                sentence=f"{key} was {step.change:+.1%} over the last {after} nights against the {step.index} before; "
                "no single night shows it, and the machine may be the cause as well as the code",
            )
        )  # fmt: skip
    return findings


def _find_blindness(before: Sequence[RunRecord], tonight: RunRecord) -> list[Finding]:
    runs = [*(r for r in same_series(before, tonight) if r.kind is RunKind.NIGHTLY), tonight][-BLIND_NIGHTS:]
    if len(runs) < BLIND_NIGHTS or not all(run.dirty for run in runs):
        return []
    reason = tonight.dirty[0]
    sentence = f"no times could be judged on the last {BLIND_NIGHTS} nights; tonight: {reason}"
    return [Finding(rule=Rule.BLIND, series=None, sentence=sentence)]


def _to_finding(suspect: SuspectRecord) -> Finding | None:
    """An alarm for what is slower, and for what is faster by more than 5 %."""
    was_measured = suspect.confirmed_change is not None
    change = suspect.confirmed_change if suspect.confirmed_change is not None else suspect.change
    slower = suspect.outcome is Outcome.SLOWER
    if not slower and not (suspect.outcome is Outcome.FASTER and -change > IMPROVED_CHANGE):
        return None
    against = "than the last good commit, measured again tonight" if was_measured else "than usual, two nights in a row"
    return Finding(
        rule=Rule.SLOWER if slower else Rule.IMPROVED, series=suspect.series,
        sentence=f"{suspect.series} is {abs(change):.1%} {'slower' if slower else 'faster'} {against}",
        evidence=Evidence.SAME_NIGHT if was_measured else Evidence.TWO_NIGHTS,
        old=suspect.old, new=suspect.new, change=change, p_value=suspect.p_value, q_value=suspect.q_value,
    )  # fmt: skip


def _count_screened(nights: Sequence[NightValues], values: NightValues) -> int:
    return sum(1 for key in values if key.metric.kind is MetricKind.TIME and collect(nights, key))


def _describe_gaps(
    before: Sequence[RunRecord], tonight: RunRecord, nights: Sequence[NightValues], suspects: Sequence[SuspectRecord]
) -> Iterable[str]:
    """What a reader has to know of what was not judged."""
    if tonight.dirty:
        yield f"times were not judged, the night was dirty: {'; '.join(tonight.dirty)}"
    if not nights:
        known = any(record.suite_digest == tonight.suite_digest for record in before)
        yield "first clean night in this environment" if known else "first clean night of this suite"
    waiting = [str(suspect.series) for suspect in suspects if suspect.outcome is Outcome.OPEN]
    if waiting:
        yield f"out of their range, to be confirmed by the next night: {', '.join(waiting)}"
