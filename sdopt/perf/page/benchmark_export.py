"""A run for the tools that others draw their charts with.

github-action-benchmark reads a list of {name, unit, value, range, extra}; its tools `customSmallerIsBetter` and
`customBiggerIsBetter` want a file each. pytest-benchmark's JSON has seconds, and statistics beside the raw samples:
https://github.com/benchmark-action/github-action-benchmark, https://pytest-benchmark.readthedocs.io
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdopt.disk.files import disk_errors, write_file
from sdopt.perf.history.record import MetricKind, RunRecord, SeriesKey
from sdopt.perf.history.view import Point, list_points

SMALLER_NAME = "github-smaller-is-better.json"
BIGGER_NAME = "github-bigger-is-better.json"
PYTEST_NAME = "pytest-benchmark.json"
_PYTEST_BENCHMARK = "5.3.1"
"""Whose format it is, and which was tried with it."""
_BIGGER = (MetricKind.PSNR, MetricKind.SSIM)
_TIMES = (MetricKind.TIME, MetricKind.START, MetricKind.BUILD)
# Fences of Tukey's box: data beyond them count as outliers.
_FENCE_IQRS = 1.5


def write_exports(folder: Path, record: RunRecord) -> tuple[Path, ...]:
    """Write all three files of a run into a folder, which is made if need be, and return their paths."""
    texts = {
        SMALLER_NAME: export_github(record, bigger=False),
        BIGGER_NAME: export_github(record, bigger=True),
        PYTEST_NAME: export_pytest(record),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_file(folder / name, text.encode())
    return tuple(folder / name for name in texts)


def export_github(record: RunRecord, *, bigger: bool) -> str:
    """Each series' value in ns, bytes or dB. Equal pictures, whose PSNR has no number, are left out."""
    points = [(key, point) for key, point in list_points(record, 0) if math.isfinite(point.value)]
    chosen = [(key, point) for key, point in points if (key.metric.kind in _BIGGER) == bigger]
    return _to_json([_make_entry(record, key, point) for key, point in chosen])


def export_pytest(record: RunRecord) -> str:
    """Series of times only; the others have no place in it. A group is a case's metric, with its candidates."""
    system, _, machine = record.environment.system.partition(" ")
    times = [series for series in record.series if series.key.metric.kind in _TIMES]
    return _to_json(
        {
            "machine_info": {
                "node": record.fingerprint,
                "processor": record.environment.processor,
                "machine": machine,
                "python_version": record.environment.python,
                "system": system,
                "cpu": {"brand_raw": record.environment.processor, "count": record.logical_cores},
            },
            "commit_info": {
                "id": record.commit or "unversioned",
                "time": None,
                "author_time": None,
                "dirty": record.changed,
                "project": "sdopt",
                "branch": "(unknown)",
            },
            "benchmarks": [
                _make_benchmark(record, series.key, series.groups) for series in times if any(series.groups)
            ],
            "datetime": record.created_utc,
            "version": _PYTEST_BENCHMARK,
        }
    )


def _make_entry(record: RunRecord, key: SeriesKey, point: Point) -> dict[str, Any]:
    extra = [f"commit: {record.commit[:12] or 'none'}", f"environment: {record.fingerprint}", f"run: {record.id}"]
    extra += [f"dirty: {reason}" for reason in record.dirty]
    entry = {"name": str(key), "unit": _name_unit(key), "value": point.value, "extra": "\n".join(extra)}
    if math.isfinite(point.high - point.low) and point.high > point.low:
        entry["range"] = f"± {(point.high - point.low) / 2:.6g}"
    return entry


def _name_unit(key: SeriesKey) -> str:
    match key.metric.kind:
        case MetricKind.MEMORY | MetricKind.SIZE:
            return "bytes"
        case MetricKind.PSNR:
            return "dB"
        case MetricKind.SSIM:
            return "SSIM"
        case _:
            return "ns"


def _make_benchmark(record: RunRecord, key: SeriesKey, groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {
        "group": f"{key.case}/{key.metric}",
        "name": f"{key.candidate}/{key.metric}",
        "fullname": str(key),
        "params": None,
        "param": None,
        "extra_info": {
            "run": record.id, "environment": record.fingerprint, "dirty": list(record.dirty), "processes": len(groups),
        },
        "options": {},
        "stats": summarize_seconds([sample / 1e9 for group in groups for sample in group]),
    }  # fmt: skip


def summarize_seconds(data: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's `stats` of at least one sample in seconds."""
    ordered = sorted(data)
    mean = statistics.fmean(data)
    deviation = statistics.stdev(data) if len(data) > 1 else 0.0
    q1, q3 = find_quartiles(ordered)
    low, high = q1 - _FENCE_IQRS * (q3 - q1), q3 + _FENCE_IQRS * (q3 - q1)
    far = sum(not mean - deviation <= value <= mean + deviation for value in data)
    beyond = sum(not low <= value <= high for value in data)
    total = math.fsum(data)
    return {
        "min": ordered[0], "max": ordered[-1], "mean": mean, "stddev": deviation, "rounds": len(data),
        "median": statistics.median(data), "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": beyond,
        "stddev_outliers": far, "outliers": f"{far};{beyond}", "ld15iqr": ordered[bisect_left(ordered, low)],
        "hd15iqr": ordered[bisect_right(ordered, high) - 1], "ops": len(data) / total if total else 0,
        "total": total, "data": list(data), "iterations": 1,
    }  # fmt: skip


def find_quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """As pytest-benchmark finds them: medians of the halves of an even number, between whose neighbours a quarter is
    weighed for an odd one (https://en.wikipedia.org/wiki/Quartile, methods 2 and 3).
    """
    count = len(ordered)
    if count == 1:
        return ordered[0], ordered[0]
    if count % 2 == 0:
        return statistics.median(ordered[: count // 2]), statistics.median(ordered[count // 2 :])
    n = count // 4
    if count % 4 == 1:
        return 0.25 * ordered[n - 1] + 0.75 * ordered[n], 0.75 * ordered[3 * n] + 0.25 * ordered[3 * n + 1]
    return 0.75 * ordered[n] + 0.25 * ordered[n + 1], 0.25 * ordered[3 * n + 1] + 0.75 * ordered[3 * n + 2]


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
