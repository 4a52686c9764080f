"""What other tools read: github-action-benchmark's entries, and pytest-benchmark's statistics of the raw samples."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.perf.history.record import Metric
from sdopt.perf.page.benchmark_export import (
    BIGGER_NAME,
    PYTEST_NAME,
    SMALLER_NAME,
    export_github,
    export_pytest,
    find_quartiles,
    summarize_seconds,
    write_exports,
)
from tests.planted_runs import make_key, make_run

VALUES = {
    make_key(): ((9.9e7, 1.0e8, 1.01e8), (1.02e8, 1.03e8, 1.04e8)),
    make_key(candidate="eager-fp32"): 3e8,
    make_key(Metric.LOAD): ((2e9,),),
    make_key(Metric.PEAK_MEMORY): ((5e8,),),
    make_key(Metric.PSNR): ((45.0, 47.0),),
    make_key(Metric.SSIM): ((0.98,),),
    make_key(Metric.PSNR, "eager-fp32"): ((math.inf,),),
}
RUN = make_run(0, VALUES, dirty=("a neighbour",))
# Every field of pytest-benchmark 5.3.1's `Stats`, and what `Metadata.as_dict` adds.
STATS = {
    "min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iqr_outliers", "stddev_outliers",
    "outliers", "ld15iqr", "hd15iqr", "ops", "total", "data", "iterations",
}  # fmt: skip


def test_entries_for_a_chart_are_parted_by_what_is_better() -> None:
    smaller = json.loads(export_github(RUN, bigger=False))
    bigger = json.loads(export_github(RUN, bigger=True))
    assert {entry["name"]: (entry["value"], entry["unit"]) for entry in smaller} == {
        "tiny/engines/end_to_end": (1.015e8, "ns"),
        "tiny/eager-fp32/end_to_end": (3e8, "ns"),
        "tiny/engines/load": (2e9, "ns"),
        "tiny/engines/peak_memory": (5e8, "bytes"),
    }
    assert {entry["name"]: (entry["value"], entry["unit"]) for entry in bigger} == {
        "tiny/engines/psnr": (45.0, "dB"),
        "tiny/engines/ssim": (0.98, "SSIM"),
    }
    for entry in (*smaller, *bigger):
        assert set(entry) <= {"name", "unit", "value", "range", "extra"}
        assert "dirty: a neighbour" in entry["extra"]
    assert smaller[0]["range"] == "± 1.5e+06"
    assert "range" not in smaller[2]


def test_times_are_in_seconds_with_every_field_that_the_tool_reads() -> None:
    table = json.loads(export_pytest(RUN))
    assert set(table) == {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    assert [bench["fullname"] for bench in table["benchmarks"]] == [
        "tiny/engines/end_to_end",
        "tiny/eager-fp32/end_to_end",
        "tiny/engines/load",
    ]
    first = table["benchmarks"][0]
    assert set(first) == {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert set(first["stats"]) == STATS
    assert first["stats"]["data"] == pytest.approx([0.099, 0.1, 0.101, 0.102, 0.103, 0.104])
    assert first["stats"]["rounds"] == 6
    assert first["group"] == table["benchmarks"][1]["group"] == "tiny/end_to_end"
    assert table["commit_info"]["dirty"] is False
    assert table["commit_info"]["id"] == RUN.commit
    assert table["datetime"] == RUN.created_utc


def test_quartiles_of_the_textbook() -> None:
    """The two examples of https://en.wikipedia.org/wiki/Quartile, by its methods 3 and 2; then 9 values by hand."""
    assert find_quartiles([6, 7, 15, 36, 39, 40, 41, 42, 43, 47, 49]) == (20.25, 42.75)
    assert find_quartiles([7, 15, 36, 39, 40, 41]) == (15, 40)
    assert find_quartiles([1, 2, 3, 4, 5, 6, 7, 8, 9]) == (2.75, 7.25)
    assert find_quartiles([3.0]) == (3.0, 3.0)


def test_outliers_are_beyond_the_fences() -> None:
    stats = summarize_seconds([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0])
    assert (stats["q1"], stats["q3"]) == (pytest.approx(1.15), pytest.approx(1.55))
    assert stats["outliers"] == "1;1"
    assert (stats["ld15iqr"], stats["hd15iqr"]) == (1.0, 1.6)
    assert stats["ops"] == pytest.approx(8 / 18.1)


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=40))
def test_statistics_are_in_order(data: list[float]) -> None:
    stats = summarize_seconds(data)
    order = [stats[name] for name in ("min", "q1", "median", "q3", "max")]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(order))
    inside = [value for value in data if value not in (stats["ld15iqr"], stats["hd15iqr"])]
    assert {stats["ld15iqr"], stats["hd15iqr"]} <= set(data)
    assert stats["iqr_outliers"] == sum(not stats["ld15iqr"] <= value <= stats["hd15iqr"] for value in inside)
    assert stats["median"] == statistics.median(data)
    assert stats["data"] == data


def test_all_files_are_written_as_plain_json(tmp_path: Path) -> None:
    paths = write_exports(tmp_path / "new" / "folder", RUN)
    assert [path.name for path in paths] == [SMALLER_NAME, BIGGER_NAME, PYTEST_NAME]
    for path in paths:
        json.loads(path.read_text(), parse_constant=pytest.fail)
