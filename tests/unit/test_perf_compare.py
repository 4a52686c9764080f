"""Two reports or runs side by side: what is faster is said, and what cannot be compared is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.case.report import BenchReport, write_report
from sdopt.bench.case.stats import Speed
from sdopt.errors import ArtifactError, UsageError
from sdopt.perf.gate.compare_runs import (
    OTHER_ENVIRONMENT,
    Comparison,
    compare_files,
    compare_reports,
    compare_runs,
    comparison_to_json,
    format_comparison,
)
from sdopt.perf.history.history import History
from sdopt.perf.history.record import Metric
from tests.planted_reports import make_candidate, make_report
from tests.planted_runs import NEWER_ENVIRONMENT, make_key, make_run

PROMPTS = ("a red circle", "a star")
VALUES = {
    make_key(): 1e8,
    make_key(Metric.PEAK_MEMORY): 5e8,
    make_key(Metric.PSNR): ((40.0, 50.0),),
    make_key(Metric.SSIM): ((0.99,),),
    make_key(Metric.BUILD): ((6e10,),),
}


def find(comparison: Comparison, metric: Metric, candidate: str = "engines") -> Any:
    return next(r for r in comparison.rows if (r.key.metric, r.key.candidate) == (metric, candidate))


def test_faster_slower_and_no_difference_by_series() -> None:
    keys = [make_key(candidate=name) for name in ("halved", "more", "same")]
    before = make_run(0, dict.fromkeys(keys, 1e8))
    after = make_run(1, dict(zip(keys, (5e7, 1.1e8, 1.005e8), strict=True)))
    comparison = compare_runs(before, after)
    speeds = {row.key.candidate: row.verdict.speed for row in comparison.rows if row.verdict}
    assert speeds == {"halved": Speed.FASTER, "more": Speed.SLOWER, "same": Speed.NO_DIFFERENCE}
    halved = find(comparison, Metric.END_TO_END, "halved")
    assert halved.verdict.ratio.value == pytest.approx(2, rel=0.01)
    assert halved.change == pytest.approx(-0.5)


def test_other_metrics_have_a_change_and_no_verdict() -> None:
    after = {
        make_key(): 1e8,
        make_key(Metric.PEAK_MEMORY): 5.5e8,
        make_key(Metric.PSNR): ((38.5, 50.0),),
        make_key(Metric.SSIM): ((0.98,),),
        make_key(Metric.BUILD): ((9e10,),),
    }
    comparison = compare_runs(make_run(0, VALUES), make_run(1, after))
    changes = {row.key.metric: row.change for row in comparison.rows if row.verdict is None}
    assert changes == {
        Metric.PEAK_MEMORY: pytest.approx(0.1),
        Metric.PSNR: pytest.approx(-1.5),
        Metric.SSIM: pytest.approx(-0.01),
        Metric.BUILD: pytest.approx(0.5),
    }


def test_what_only_one_has_is_listed() -> None:
    comparison = compare_runs(make_run(0, VALUES), make_run(1, {make_key(): 1e8, make_key(Metric.LOAD): 1e9}))
    assert comparison.only_after == (make_key(Metric.LOAD),)
    assert set(comparison.only_before) == set(VALUES) - {make_key()}


def test_different_environments_are_refused_and_forced_ones_are_marked_everywhere() -> None:
    before, after = make_run(0, VALUES), make_run(1, VALUES, environment=NEWER_ENVIRONMENT)
    with pytest.raises(UsageError, match=r"different environments: torch 2\.12 -> 2\.13") as caught:
        compare_runs(before, after)
    assert "--force" in caught.value.hint
    forced = compare_runs(before, after, force=True)
    assert forced.environments == ("torch 2.12 -> 2.13",)
    assert all(row.note == OTHER_ENVIRONMENT for row in forced.rows)
    text = format_comparison(forced)
    assert "DIFFERENT ENVIRONMENTS: torch 2.12 -> 2.13" in text
    assert text.count(f"({OTHER_ENVIRONMENT})") == len(VALUES)
    table = json.loads(comparison_to_json(forced))
    assert table["same_environment"] is False
    assert {row["note"] for row in table["rows"]} == {OTHER_ENVIRONMENT}
    assert OTHER_ENVIRONMENT not in format_comparison(compare_runs(before, make_run(1, VALUES), force=True))


def test_runs_of_different_suites_are_refused_even_when_forced() -> None:
    with pytest.raises(UsageError, match="different suites"):
        compare_runs(make_run(0, VALUES), make_run(1, VALUES, suite_digest="00" * 32), force=True)


def change_case(report: BenchReport, **changes: Any) -> BenchReport:
    return report.model_copy(update={"case": report.case.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 4}, "steps"),
        ({"prompts": ("a circle",)}, "prompts"),
        ({"width_px": 128}, "width"),
        ({"seed": 1, "guidance_scale": 7.5}, "seed, guidance scale"),
        ({"scheduler": "DDIM"}, "scheduler"),
        ({"inputs_digest": "cd" * 32}, "initial latents"),
    ],
)
def test_reports_of_different_cases_are_refused_even_when_forced(changes: dict[str, Any], words: str) -> None:
    report = change_case(make_report(), inputs_digest="ab" * 32)
    with pytest.raises(UsageError, match=f"different cases: {words}\n"):
        compare_reports(report, change_case(report, **changes), force=True)


def test_two_bundles_of_one_case_can_be_compared() -> None:
    report = make_report()
    assert compare_reports(report, change_case(report, bundle="other", digest="cd" * 32)).rows


def test_reports_are_compared_by_candidate_and_stage(tmp_path: Path) -> None:
    write_report(tmp_path / "a.json", make_report())
    (tmp_path / "b").mkdir()
    write_report(tmp_path / "b" / "report.json", make_report(processes=make_candidate("x", (70, 71, 69), ()).processes))
    history = History(tmp_path / "none.jsonl")
    comparison = compare_files(str(tmp_path / "a.json"), str(tmp_path / "b"), history)
    assert find(comparison, Metric.END_TO_END).verdict.speed is Speed.FASTER
    assert find(comparison, Metric.UNET_STEP).verdict.speed is Speed.FASTER
    assert find(comparison, Metric.END_TO_END, "eager-fp32").verdict.speed is Speed.NO_DIFFERENCE
    assert find(comparison, Metric.PSNR, "eager-fp32").change == 0
    text = format_comparison(comparison)
    assert "tiny/engines/end_to_end" in text
    assert "equal" in text
    assert "-31.4%" in text
    json.loads(comparison_to_json(comparison), parse_constant=pytest.fail)


def test_runs_are_compared_by_id_and_a_mixture_is_refused(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    for night in range(3):
        history.append(make_run(night, VALUES, dirty=("other programs kept 0.40 cores busy",) if night == 2 else ()))
    comparison = compare_files("20260101", "last", history)
    assert comparison.after == make_run(2, VALUES).id
    assert comparison.warnings == (f"{comparison.after} is dirty: other programs kept 0.40 cores busy",)
    assert comparison.warnings[0] in format_comparison(comparison)
    write_report(tmp_path / "a.json", make_report())
    with pytest.raises(UsageError, match="a report and no report"):
        compare_files(str(tmp_path / "a.json"), "last", history)
    with pytest.raises(UsageError, match="no run"):
        compare_files("nothing", "last", history)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        compare_files(str(tmp_path / "bad.json"), str(tmp_path / "a.json"), history)


def test_pictures_that_are_no_longer_equal_have_a_number() -> None:
    key = make_key(Metric.PSNR)
    comparison = compare_runs(make_run(0, {key: ((math.inf,),)}), make_run(1, {key: ((40.0,),)}))
    (row,) = comparison.rows
    assert row.change == -math.inf
    assert "equal  40.00 dB" in format_comparison(comparison)
    assert json.loads(comparison_to_json(comparison))["rows"][0]["before"] == "inf"
