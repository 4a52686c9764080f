"""The rules that take tonight's figures as they are: failures, missing series, fidelity, memory, size, build time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from sdopt.perf.gate.findings import Finding, Rule
from sdopt.perf.history.nights import NightValues, collect, relative_change
from sdopt.perf.history.record import MetricKind, RunRecord, SeriesKey

IMPROVED_CHANGE = 0.05
_SHOWN = 5


@dataclass(frozen=True)
class _Limit:
    """How much worse than its history's median a metric may be; relative, or for fidelity in its unit downwards."""

    rule: Rule
    noun: str
    allowed: float
    unit: str = ""


_LIMITS = {
    MetricKind.MEMORY: _Limit(Rule.MEMORY, "peak memory", 0.03),
    MetricKind.SIZE: _Limit(Rule.SIZE, "size on disk", 0.05),
    MetricKind.BUILD: _Limit(Rule.BUILD, "build time", 0.25),
    MetricKind.PSNR: _Limit(Rule.FIDELITY, "PSNR", 1.0, " dB"),
    MetricKind.SSIM: _Limit(Rule.FIDELITY, "SSIM", 0.005),
}
_FIDELITY = (MetricKind.PSNR, MetricKind.SSIM)


def find_failures(complete: RunRecord | None, tonight: RunRecord) -> list[Finding]:
    """Candidates that failed tonight, unless the last run that passed had the same failure, which then was accepted."""
    known = {(failure.case, failure.candidate) for failure in complete.failures} if complete else set()
    return [
        Finding(
            rule=Rule.FAILED, series=None,
            sentence=f"{failure.case}/{failure.candidate or 'all candidates'} failed: {failure.message}",
        )
        for failure in tonight.failures
        if (failure.case, failure.candidate) not in known
    ]  # fmt: skip


def find_missing(expected: Iterable[SeriesKey], values: NightValues, tonight: RunRecord) -> list[Finding]:
    """A finding for each candidate that lacks series tonight (or has a NaN in one), unless its failure says so.

    A build whose parts were found in a store has no build time, and that is no loss.
    """
    failed = {(failure.case, failure.candidate) for failure in tonight.failures}
    lost: dict[tuple[str, str], list[SeriesKey]] = {}
    for key in expected:
        if key.metric.kind is MetricKind.BUILD or key in values:
            continue
        if not failed & {(key.case, key.candidate), (key.case, "")}:
            lost.setdefault((key.case, key.candidate), []).append(key)
    findings = [
        Finding(
            rule=Rule.MISSING, series=keys[0] if len(keys) == 1 else None,
            sentence=f"{case}/{candidate} lacks {_name_some(keys)}, which the last run that passed had",
        )
        for (case, candidate), keys in lost.items()
    ]  # fmt: skip
    if not values and not tonight.failures and not findings:
        findings.append(Finding(rule=Rule.MISSING, series=None, sentence="nothing was measured"))
    return findings


def check_limits(nights: Sequence[NightValues], tonight: NightValues) -> Iterator[Finding]:
    """Memory +3 %, size +5 %, build time +25 %, PSNR -1 dB, SSIM -0.005, and what improved by more than 5 %.

    A shorter build counts as improved beyond 25 % alone: it varies more than the others. The nights of a build time
    have to be clean ones.
    """
    for key, new in tonight.items():
        limit, before = _LIMITS.get(key.metric.kind), collect(nights, key)
        if limit is None or not before:
            continue
        old = median(before)
        found = (_check_fidelity if key.metric.kind in _FIDELITY else _check_growth)(key, limit, old, new)
        if found:
            yield found


def _check_fidelity(key: SeriesKey, limit: _Limit, old: float, new: float) -> Finding | None:
    lost = 0.0 if old == new else old - new  # both are infinite where pictures are equal
    if lost <= limit.allowed:
        return None
    return Finding(
        rule=limit.rule, series=key, old=old, new=new, change=-lost,
        sentence=f"{limit.noun} of {key.case}/{key.candidate} fell from {old:.4g} to {new:.4g}{limit.unit}, "
        f"and {limit.allowed:g}{limit.unit} is allowed",
    )  # fmt: skip


def _check_growth(key: SeriesKey, limit: _Limit, old: float, new: float) -> Finding | None:
    change = relative_change(old, new)
    improved = -change > max(IMPROVED_CHANGE, limit.allowed if limit.rule is Rule.BUILD else 0.0)
    if change <= limit.allowed and not improved:
        return None
    verb = "fell" if improved else "grew"
    amount = f" by {abs(change):.1%}" if math.isfinite(change) else " from nothing"
    return Finding(
        rule=Rule.IMPROVED if improved else limit.rule, series=key, old=old, new=new, change=change,
        sentence=f"{limit.noun} ({key.metric}) of {key.case}/{key.candidate} {verb}{amount}",
    )  # fmt: skip


def _name_some(keys: Sequence[SeriesKey]) -> str:
    names = ", ".join(key.metric for key in keys[:_SHOWN])
    return names if len(keys) <= _SHOWN else f"{names} and {len(keys) - _SHOWN} more"
