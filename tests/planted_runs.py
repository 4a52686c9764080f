"""Planted runs for the tests of the history and of its gate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sdopt.bench.case.report import Conditions
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.perf.history.fingerprint import fingerprint_of
from sdopt.perf.history.record import Metric, RunKind, RunRecord, SeriesKey, SeriesRecord

FIRST_NIGHT = datetime(2026, 1, 1, 3, 0, tzinfo=UTC)
ENVIRONMENT = EnvironmentRecord(
    sdopt="0.1", python="3.11.9", system="Linux x86_64", processor="A processor", cpu_features=("avx2",),
    libraries={"torch": "2.12", "openvino": "2026.0"},
)  # fmt: skip
# The same environment after an update.
NEWER_ENVIRONMENT = ENVIRONMENT.model_copy(update={"libraries": {"torch": "2.13", "openvino": "2026.0"}})

Value = float | Sequence[Sequence[float]]
"""A median, from which groups are made, or the groups themselves."""


def make_key(metric: Metric = Metric.END_TO_END, candidate: str = "engines", case: str = "tiny") -> SeriesKey:
    return SeriesKey(case=case, candidate=candidate, metric=metric)


def make_groups(median: float, spread: float = 0.004, processes: int = 2) -> tuple[tuple[float, ...], ...]:
    """Five samples a process, symmetric about the process's median; the median of the processes' is `median`."""
    shifts = [spread * (2 * p / (processes - 1) - 1) if processes > 1 else 0.0 for p in range(processes)]
    return tuple(tuple(median * (1 + shift + spread * step) for step in (0, -0.5, 0.5, -1, 1)) for shift in shifts)


def make_series(key: SeriesKey, value: Value) -> SeriesRecord:
    groups = make_groups(value) if isinstance(value, int | float) else tuple(tuple(map(float, g)) for g in value)
    return SeriesRecord(key=key, groups=groups)


def make_run(night: int, values: Mapping[SeriesKey, Value], **changes: Any) -> RunRecord:
    """The run of a night, 0 being 1 January 2026; `changes` are fields of the record.

    The fingerprint follows from the environment unless it is given.
    """
    created = FIRST_NIGHT + timedelta(days=night)
    fields: dict[str, Any] = {
        "id": f"{created:%Y%m%dT%H%M%SZ}-{night:08x}",
        "created_utc": created.isoformat(),
        "kind": RunKind.NIGHTLY,
        "suite": "nightly",
        "suite_digest": "5e" * 32,
        "commit": hashlib.sha1(str(night).encode()).hexdigest(),
        "changed": False,
        "environment": ENVIRONMENT,
        "logical_cores": 2,
        "memory_bytes": 24 << 30,
        "digests": {key.case: "ab" * 32 for key in values},
        "dirty": (),
        "conditions": Conditions(neighbours_cores=0.01),
        "series": tuple(make_series(key, value) for key, value in values.items()),
        "verdict": "pass",
    }
    fields |= changes
    fields.setdefault(
        "fingerprint", fingerprint_of(fields["environment"], fields["logical_cores"], fields["memory_bytes"])
    )
    return RunRecord(**fields)


def make_nights(count: int, values: Mapping[SeriesKey, Value], *, first: int = 0, **changes: Any) -> list[RunRecord]:
    """Nights of the same values."""
    return [make_run(night, values, **changes) for night in range(first, first + count)]
