"""Which runs of the history tonight is held against, and the one value that a series has in each of them.

Runs of another fingerprint or suite never count, nor those that alarmed: a regression that nobody repairs does not
become the usual. What a person accepts does: `accept_run` gives the record that starts such series anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from sdopt.perf.history.record import MetricKind, RunKind, RunRecord, SeriesKey, SeriesRecord

NIGHTS = 14
PROVEN_RUNS = 7
ACCEPTED_CHANGE = 0.02
"""A series of times starts anew with an accepted run that differs from its history by more than this, relatively.

The others start anew where it differs at all: their rules know no noise.
"""

NightValues = Mapping[SeriesKey, float]


def take_value(series: SeriesRecord) -> float | None:
    """What a run says of a series, in its unit; None where it has no sample, or one that is not a number.

    The median of the processes' medians. Of PSNR and SSIM the worst picture: one that broke is seldom the median.
    """
    groups = [group for group in series.groups if group]
    samples = [sample for group in groups for sample in group]
    is_fidelity = series.key.metric.kind in (MetricKind.PSNR, MetricKind.SSIM)
    # Equal pictures have an infinite PSNR; an infinite time is a fault.
    if not samples or any(math.isnan(s) or (math.isinf(s) and not is_fidelity) for s in samples):
        return None
    return min(samples) if is_fidelity else float(median(median(group) for group in groups))


def take_values(record: RunRecord) -> dict[SeriesKey, float]:
    values = ((series.key, take_value(series)) for series in record.series)
    return {key: value for key, value in values if value is not None}


def relative_change(old: float, new: float) -> float:
    """By how much of `old` `new` is more: 0.05 is 5 % more. Infinity where something came out of nothing."""
    if old == new:
        return 0.0
    return (new - old) / old if old else math.inf


def same_series(records: Iterable[RunRecord], tonight: RunRecord) -> list[RunRecord]:
    """Of the same suite in the same environment, in their order."""
    place = (tonight.fingerprint, tonight.suite_digest)
    return [record for record in records if (record.fingerprint, record.suite_digest) == place]


def find_last_good(records: Sequence[RunRecord], tonight: RunRecord) -> RunRecord | None:
    """The run whose commit tonight is measured against: the newest that passed and was followed by six that did, too.

    A slow-down that the first night's screen misses passes that night. Were its commit good from then on, the next
    night would be held against the slow-down itself, and clear it. With fewer runs it is the oldest; it is none from
    before an accepted run, and none with changes that are not committed. A bridge run counts as passed. A night of open
    suspicions or dirty times does not (`GateReport.recorded_verdict`).
    """
    good: list[RunRecord] = []
    for record in reversed(same_series(records, tonight)):
        if (record.verdict == "pass" or _is_bridge(record)) and not record.changed:
            good.append(record)
        if len(good) == PROVEN_RUNS or is_accepted(record):
            break
    return good[-1] if good else None


def find_complete(records: Sequence[RunRecord], tonight: RunRecord) -> RunRecord | None:
    """The newest run that says which series there should be: of the same suite and processor, in any environment.

    A library or a driver that is gone opens a new series, and its bridge run lacks what tonight lacks.
    """
    machine = (tonight.suite_digest, tonight.environment.processor, tonight.logical_cores)
    passed = [
        record
        for record in records
        if record.verdict == "pass"
        and (record.suite_digest, record.environment.processor, record.logical_cores) == machine
    ]
    return passed[-1] if passed else find_last_good(records, tonight)


def accept_run(record: RunRecord, *, id: str, created_utc: str) -> RunRecord:
    """The line that a person appends to the history to accept a run that alarmed: the run again, by hand, passed.

    Its commit becomes the last good one, and the series that it moved start anew with it; the others go on.
    """
    return record.model_copy(
        update={"kind": RunKind.MANUAL, "verdict": "pass", "id": id, "created_utc": created_utc, "changed": False}
    )


def is_accepted(record: RunRecord) -> bool:
    return record.kind is RunKind.MANUAL and record.verdict == "pass"


def select_nights(
    records: Sequence[RunRecord], tonight: RunRecord, *, clean: bool, most: int = NIGHTS
) -> list[NightValues]:
    """The values of the last runs that tonight is held against, oldest first; of clean ones only for times.

    A night lacks the series that started anew after it.
    """
    chosen = [r for r in same_series(records, tonight) if _counts(r) and not (clean and r.dirty)]
    nights: list[dict[SeriesKey, float]] = []
    for record in chosen:
        values = take_values(record)
        if is_accepted(record):
            for key in _find_moved(nights[-most:], values):
                for night in nights:
                    night.pop(key, None)
        nights.append(values)
    return list(nights[-most:])


def collect(nights: Iterable[NightValues], key: SeriesKey) -> list[float]:
    return [night[key] for night in nights if key in night]


def _find_moved(nights: Sequence[NightValues], accepted: NightValues) -> list[SeriesKey]:
    return [key for key, value in accepted.items() if _has_moved(key, collect(nights, key), value)]


def _has_moved(key: SeriesKey, before: Sequence[float], value: float) -> bool:
    if not before:
        return False
    if key.metric.kind is MetricKind.TIME:
        return abs(relative_change(median(before), value)) > ACCEPTED_CHANGE
    return median(before) != value


def _counts(record: RunRecord) -> bool:
    if record.kind is RunKind.MANUAL:
        return record.verdict == "pass"
    return record.verdict != "alarm"


def _is_bridge(record: RunRecord) -> bool:
    return record.kind is RunKind.BRIDGE and record.verdict != "alarm" and not record.dirty
