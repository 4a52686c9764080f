"""The files beside the page: the record, and tables that a spreadsheet opens and does not compute."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from sdopt.bench.case.report import Stage, read_report
from sdopt.bench.case.stats import Speed
from sdopt.bench.page.csv_export import SAMPLE_COLUMNS, SUMMARY_COLUMNS, format_samples, format_summary, quote_formula
from sdopt.bench.page.figures import find_energy, find_layers, fit_candidate, measure_roofline_use, split_memory
from sdopt.bench.page.pairs import judge_pairs, lay_out_matrix
from sdopt.bench.page.render import render_html
from sdopt.bench.page.report_files import write_report_files
from sdopt.bench.page.summary import summarize_candidates
from sdopt.bench.run import BenchResult
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from tests.planted_reports import MS, make_full_report, make_process, make_report, make_result, make_unet_report


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_four_files_and_the_record_reads_back(tmp_path: Path) -> None:
    report = make_full_report()
    page = write_report_files(tmp_path, make_result(report))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "summary.csv",
    ]
    assert page == tmp_path / "report.html"
    assert read_report(tmp_path / "report.json") == report
    assert (tmp_path / "report.csv").read_text("utf-8").splitlines() == format_samples(report).splitlines()


def test_every_sample_is_a_row_of_its_own() -> None:
    report = make_full_report()
    text = format_samples(report)
    assert text.splitlines()[0] == ",".join(SAMPLE_COLUMNS)
    rows = read_csv(text)
    for record in report.candidates:
        for process in record.processes:
            own = [r for r in rows if r["candidate"] == record.name and r["process"] == str(process.position)]
            for stage, samples in process.samples_ns.items():
                found = [(int(r["index"]), int(r["ns"])) for r in own if r["stage"] == stage.value]
                assert found == list(enumerate(samples))
            assert [int(r["ns"]) for r in own if r["stage"] == "warm_up"] == list(process.warm_up_ns)
            sweep = [(int(r["steps"]), int(r["ns"])) for r in own if r["stage"] == "sweep"]
            assert sweep == [(steps, ns) for steps, samples in process.sweep_ns.items() for ns in samples]


def test_the_summary_has_a_row_for_each_stage_and_for_a_failure() -> None:
    rows = read_csv(format_summary(make_full_report()))
    assert set(rows[0]) == set(SUMMARY_COLUMNS)
    whole = next(r for r in rows if r["candidate"] == "engines" and r["stage"] == "end_to_end")
    assert float(whole["median_ns"]) == pytest.approx(102 * MS)
    assert float(whole["times_as_fast"]) == pytest.approx(246.5 / 102, rel=1e-3)
    failed = next(r for r in rows if r["candidate"] == "optimum")
    assert failed["status"] == "failed"
    assert "pip install" in failed["message"]
    assert failed["median_ns"] == ""


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(evil: str) -> None:
    report = make_report((evil,))
    case = report.case.model_copy(update={"bundle": evil})
    named = report.candidates[0].model_copy(update={"label": evil, "message": evil})
    report = report.model_copy(update={"case": case, "candidates": (named, *report.candidates[1:])})
    for text in (format_samples(report), format_summary(report)):
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert f"'{evil}" in {cell for row in rows for cell in row}
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row)


def test_only_what_a_spreadsheet_would_compute_is_quoted() -> None:
    assert quote_formula("tiny-shapes") == "tiny-shapes"
    assert quote_formula("") == ""


def test_pairs_are_the_same_from_both_sides() -> None:
    pairs = judge_pairs(make_full_report())
    assert [(p.candidate.name, p.against.name) for p in pairs][:3] == [
        ("engines", "eager-fp32"), ("engines", "eager-bf16"), ("engines", "compile"),
    ]  # fmt: skip
    matrix = lay_out_matrix(pairs)
    assert "optimum" not in matrix
    there, back = matrix["engines"]["eager-fp32"].verdict, matrix["eager-fp32"]["engines"].verdict
    assert (there.speed, back.speed) == (Speed.FASTER, Speed.SLOWER)
    assert there.ratio.value * back.ratio.value == pytest.approx(1)
    assert back.ratio.low <= back.ratio.value <= back.ratio.high
    assert there.ratio.low * back.ratio.high == pytest.approx(1)
    assert matrix["eager-fp32"]["eager-bf16"].verdict.speed is Speed.NO_DIFFERENCE
    assert matrix["eager-bf16"]["eager-fp32"].verdict.speed is Speed.NO_DIFFERENCE


def test_a_report_of_the_unet_is_judged_by_its_steps() -> None:
    (pair,) = judge_pairs(make_unet_report())
    assert pair.verdict.speed is Speed.FASTER
    assert pair.verdict.ratio.value == pytest.approx(9190 / 4100)


def test_each_network_is_held_against_the_rate_of_what_it_computes_in() -> None:
    """The UNet has quantised blocks and its decoder has none; a text encoder's time is known where there is one."""
    report = make_full_report()
    precisions = {name: Precision.BF16 for name in ComponentName} | {ComponentName.UNET: Precision.INT8}
    engines = report.candidates[0].model_copy(update={"precision": Precision.INT8, "precisions": precisions})
    int8 = report.roofline[0].model_copy(update={"precision": Precision.INT8, "flops_per_s": 2e13})
    flops = {**report.case.flops, ComponentName.TEXT_ENCODER: 10_000_000}
    report = report.model_copy(
        update={
            "candidates": (engines, *report.candidates[1:]),
            "roofline": (*report.roofline, int8),
            "case": report.case.model_copy(update={"flops": flops}),
        }
    )
    uses = {use.component: use for use in measure_roofline_use(report, summarize_candidates(report)[:1])}
    assert {name: use.against for name, use in uses.items()} == {
        ComponentName.UNET: Precision.INT8, ComponentName.VAE_DECODER: Precision.BF16,
        ComponentName.TEXT_ENCODER: Precision.BF16,
    }  # fmt: skip
    slow = int8.model_copy(update={"flops_per_s": 40e9 / 25.5e-3 / 3.49})
    beaten = report.model_copy(update={"roofline": (*report.roofline[:-1], slow)})
    unet = next(
        use for use in measure_roofline_use(beaten, summarize_candidates(beaten)[:1])
        if use.component is ComponentName.UNET
    )  # fmt: skip
    assert unet.share is None
    assert "no roof measured" in unet.reason
    assert "int8" in unet.reason
    page = render_html(BenchResult(beaten, {}, None))
    assert "no roof measured" in page
    assert "349" not in page
    assert all(use.share is not None and not use.reason for use in uses.values())
    assert uses[ComponentName.UNET].share == pytest.approx(40e9 / 25.5e-3 / 2e13, rel=1e-2)
    two = report.case.model_copy(update={"flops": {**flops, ComponentName.TEXT_ENCODER_2: 1}})
    report = report.model_copy(update={"case": two})
    found = {use.component for use in measure_roofline_use(report, summarize_candidates(report)[:1])}
    assert found == {ComponentName.UNET, ComponentName.VAE_DECODER}


def test_memory_parts_add_up_to_the_peak_whatever_loading_gave_back() -> None:
    record = make_full_report().candidates[0]
    for imported, loaded in ((180_000_000, 390_000_000), (300_000_000, 250_000_000), (600_000_000, 700_000_000)):
        process = record.processes[0].model_copy(update={"rss_imported_bytes": imported, "rss_loaded_bytes": loaded})
        parts = split_memory(record.model_copy(update={"processes": (process,)}))
        assert parts is not None
        assert min(parts.libraries_bytes, parts.networks_bytes, parts.drawing_bytes) >= 0
        assert parts.libraries_bytes + parts.networks_bytes + parts.drawing_bytes == process.peak_rss_bytes
    assert split_memory(record.model_copy(update={"processes": (make_process(0, (100,)),)})) is None


def test_a_line_through_the_steps_of_all_processes() -> None:
    record = make_full_report().candidates[0]
    exact = {1: (30 * MS,), 4: (60 * MS,)}, {2: (40 * MS,), 8: (100 * MS,)}
    processes = tuple(make_process(0, (100,)).model_copy(update={"sweep_ns": sweep}) for sweep in exact)
    fit = fit_candidate(record.model_copy(update={"processes": processes}))
    assert fit is not None
    assert fit.fixed_ns == pytest.approx(20 * MS)
    assert fit.per_step_ns == pytest.approx(10 * MS)
    assert fit_candidate(make_report().candidates[0]) is None


def test_energy_is_the_median_of_the_processes_that_say_it() -> None:
    record = make_full_report().candidates[0]
    joules = (None, 4.0, 5.0, 9.0)
    processes = tuple(
        make_process(0, (100,)).model_copy(update={"energy_j": j, "energy_source": "nvml" if j else ""}) for j in joules
    )
    assert find_energy(record.model_copy(update={"processes": processes})) == (5.0, "nvml")
    assert find_energy(record.model_copy(update={"processes": processes[:1]})) is None


def test_the_first_layer_that_parts_is_not_the_worst() -> None:
    report = make_full_report()
    engines = report.candidates[0]
    errors = (0.001, 0.005, 0.09, *[0.002] * 20)
    layers = tuple(
        engines.layers[0].model_copy(update={"layer": f"block.{i}", "relative_error": error})
        for i, error in enumerate(errors)
    )
    named = engines.model_copy(update={"layers": layers})
    (finding,) = find_layers(report.model_copy(update={"candidates": (named,)}))
    assert finding.first is not None
    assert finding.first.layer == "block.1"
    assert [layer.layer for layer in finding.worst[:2]] == ["block.2", "block.1"]
    assert (finding.compared, len(finding.worst)) == (23, 10)
    exact = layers[0].model_copy(update={"relative_error": 0.0, "tolerance": 0.0})
    (finding,) = find_layers(report.model_copy(update={"candidates": (named.model_copy(update={"layers": (exact,)}),)}))
    assert finding.first is None


def test_the_main_stage_is_that_of_the_scope() -> None:
    rows = read_csv(format_summary(make_unet_report()))
    assert {r["stage"] for r in rows} == {Stage.UNET_STEP.value}
    assert float(rows[0]["times_as_fast"]) == pytest.approx(9190 / 4100)
