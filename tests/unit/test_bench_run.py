"""The bench's order, and that a failure is a row and not a gap."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt import progress
from sdopt.bench import describe as describe_module
from sdopt.bench import run as run_module
from sdopt.bench.case.candidates import Candidate, parse_against
from sdopt.bench.case.report import ComponentErrorRecord, LayerRecord, Scope, Stage, Status
from sdopt.bench.compare.component_errors import ErrorTables, LayerTables
from sdopt.bench.measure import roofline as roofline_module
from sdopt.bench.measure import unet as unet_module
from sdopt.bench.measure.process_environment import CpuUse, measure_machine, read_cpu_use
from sdopt.bench.run import BenchRequest, BenchResult, interleave, run_bench
from sdopt.bundle.records import GraphAudit
from sdopt.disk.digest import FileRecord
from sdopt.errors import MissingDependency, SdoptError
from sdopt.fidelity.drawings import write_drawing
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.model.backend_settings import OpenVINOSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import VerifySettings
from sdopt.model.shape import ShapeProfile
from sdopt.processes.call import How, Outcome
from tests.planted_reports import MS, make_drawing, make_process

PROMPTS = ("a circle", "a star")


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_candidate_runs_once_in_each_repeat_and_neighbours_alternate(count: int, repeats: int) -> None:
    names = [f"c{i}" for i in range(count)]
    order = interleave(names, repeats)
    rounds = [order[i * count : (i + 1) * count] for i in range(repeats)]
    assert all(sorted(one) == names for one in rounds)
    assert all(a == b[::-1] for a, b in pairwise(rounds))


def test_two_candidates_run_as_abba() -> None:
    assert interleave(["a", "b"], 2) == ["a", "b", "b", "a"]


def make_component(**values: Any) -> Any:
    audit = GraphAudit(opset=23, nodes=90, attention_nodes=8, attention_layers=8)
    usual = {"quantization": None, "is_quantized": False, "every_plan": (), "plans": (), "audit": audit, "parity": None}
    return SimpleNamespace(**usual | values)


def make_manifest(**records: Any) -> Any:
    bf16 = OpenVINOSettings(inference_precision=Precision.BF16)
    records = records or {"unet": make_component(backend=bf16, precision=Precision.BF16)}
    return SimpleNamespace(
        name="tiny", family="sd1", profile=ShapeProfile.static(height_px=64, width_px=64),
        profiles=(ShapeProfile.static(height_px=64, width_px=64),), build=None,
        files={"unet/model.onnx": FileRecord(sha256="ab" * 32, size_bytes=5)},
        components={ComponentName(name): record for name, record in records.items()},
        recipe=SimpleNamespace(verify=VerifySettings(prompts=PROMPTS)), model_dump_json=lambda: "{}",
    )  # fmt: skip


class FakeProcesses:
    """Stands in for the child processes: what each candidate does, by its settings' kind."""

    def __init__(self, failures: dict[str, SdoptError], nan: str = "") -> None:
        self.launched: list[str] = []
        self.targets: set[str] = set()
        self._failures, self._nan = failures, nan
        self.times_slower: dict[str, int] = {}

    def run(self, target: Any, arguments: dict[str, Any], timeout_s: float, how: How = How.WARM) -> Outcome[Any]:
        if target is roofline_module.measure_roofline:
            return self._measure_roofline()
        assert how is How.FRESH  # its import and cold start are measured
        settings = arguments["settings"]
        name = "engines" if settings is None else f"torch-{settings['precision']}"
        self.launched.append(name)
        self.targets.add(target)
        if name in self._failures:
            raise self._failures[name]
        if arguments["output"]:
            shift = float("nan") if name == self._nan else 0.02 * (name == "engines")
            write_drawing(make_drawing(len(PROMPTS), shift), Path(arguments["output"]))
        slower = self.times_slower.get(name, 1)
        values = make_process(0, (100 * slower, 110 * slower)).model_dump(
            mode="json", exclude={"position", "peak_rss_bytes"}
        )
        values["conditions"] = {"clock_steps": 1, "throttled": 0}
        return Outcome(values | {"scheduler": "PLMS"}, 400_000_000, 3 * MS)

    def measure_errors(self, folder: Path, manifest: Any, ran: Sequence[Candidate], *_: Any) -> ErrorTables:
        error = ComponentErrorRecord(relative_error=0.01, max_error=0.1, cosine=0.9999)
        messages = {candidate.name: "no room" for candidate in ran if candidate.name == "eager-bf16"}
        found = {candidate.name: {ComponentName.UNET: error} for candidate in ran if candidate.name not in messages}
        return ErrorTables(found, messages)

    def _measure_roofline(self) -> Outcome[Any]:
        if "roofline" in self._failures:
            raise self._failures["roofline"]
        record = {"device": "cpu", "precision": "fp32", "flops_per_s": 1e11, "copy_bytes_per_s": 1e10}
        return Outcome({"roofline": [record], "flops": {"unet": 7}}, 400_000_000, 3 * MS)

    def draw(self, folder: Path, manifest: Any, settings: Any, scene: Any, output: Path, **_: Any) -> Any:
        self.launched.append(output.stem)
        if output.stem in self._failures:
            raise self._failures[output.stem]
        return make_drawing(len(PROMPTS))

    def draw_twice(self, folder: Path, manifest: Any, settings: Any, scene: Any, outputs: Any, **_: Any) -> Any:
        return tuple(self.draw(folder, manifest, settings, scene, output) for output in outputs)


def run_fakes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: dict[str, SdoptError], against: str, *, nan: str = "",
    times_slower: dict[str, int] | None = None, **request: Any,
) -> tuple[BenchResult, FakeProcesses]:  # fmt: skip
    fakes = FakeProcesses(failures, nan)
    fakes.times_slower = times_slower or {}
    machine = EnvironmentRecord(sdopt="0", python="3", system="", processor="", cpu_features=(), libraries={})
    monkeypatch.setattr(run_module, "call_by_name", fakes.run)
    monkeypatch.setattr(roofline_module, "call", fakes.run)
    monkeypatch.setattr(run_module, "draw_isolated", fakes.draw)
    monkeypatch.setattr(run_module, "draw_twice_isolated", fakes.draw_twice)
    monkeypatch.setattr(run_module, "read_manifest", lambda folder: make_manifest())
    for check in ("require_pipeline", "require_sound"):  # there is no bundle on disk
        monkeypatch.setattr(run_module, check, lambda folder, manifest: None)
    monkeypatch.setattr(run_module, "require_trusted", lambda folder, manifest, named: None)
    monkeypatch.setattr(run_module, "write_scene", lambda *args, **how: None)
    monkeypatch.setattr(unet_module, "write_inputs", lambda *args: None)
    monkeypatch.setattr(run_module, "measure_component_errors", fakes.measure_errors)
    for module in (run_module, describe_module):
        monkeypatch.setattr(module, "hash_file", lambda path: "cd" * 32)
    monkeypatch.setattr(run_module, "describe_machine", lambda: machine)
    return run_bench(BenchRequest(tmp_path, parse_against(against), **{"repeats": 2} | request), tmp_path), fakes


@pytest.mark.parametrize("repeats", [None, 3])
def test_what_is_far_slower_has_fewer_processes_and_a_note_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repeats: int | None
) -> None:
    slower = {"torch-fp32": 2, "torch-bf16": 4}
    result, _ = run_fakes(
        monkeypatch, tmp_path, {}, "eager-fp32,eager-bf16", times_slower=slower, repeats=repeats
    )  # fmt: skip
    report = result.report
    counts = {candidate.name: len(candidate.processes) for candidate in report.candidates}
    assert counts == {"engines": 3, "eager-fp32": 3, "eager-bf16": 3 if repeats else 2}
    assert {name: report.method.order.count(name) for name in counts} == counts
    assert [process.position for process in report.candidates[0].processes] == [
        place for place, name in enumerate(report.method.order) if name == "engines"
    ]
    said = [note for note in report.notes if "2 processes instead of 3" in note]
    assert len(said) == (0 if repeats else 1)
    assert all("torch eager bf16" in note.lower() for note in said)


def test_each_process_says_what_is_left_by_those_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    minutes = count(step=60.0)
    clock = SimpleNamespace(monotonic=lambda: next(minutes), monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr(run_module, "time", clock)
    said: list[str] = []
    with progress.shown_by(lambda text, share: said.append(text)):
        run_fakes(monkeypatch, tmp_path, {}, "eager-fp32", repeats=3)
    starts = [text for text in said if ": starting" in text]
    left = [text.partition("about ")[2].partition(" left")[0] for text in starts]
    assert left == ["", "5 minutes", "4 minutes", "3 minutes", "2 minutes", "60 seconds"]


def test_a_whole_run_interleaves_and_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, fakes = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32,eager-bf16", suite="nightly")
    order = ["engines", "torch-fp32", "torch-bf16", "torch-bf16", "torch-fp32", "engines"]
    assert fakes.launched == [*order, "noise-floor"]
    report = result.report
    assert report.case.prompts == PROMPTS
    assert report.case.scheduler == "PLMS"
    assert [p.position for p in report.candidates[0].processes] == [0, 5]
    assert report.candidates[0].precisions == {ComponentName.UNET: Precision.BF16}
    assert report.candidates[0].samples_of(Stage.END_TO_END) == ((100 * MS, 110 * MS),) * 2
    assert report.candidates[0].fidelity[0].psnr_db == pytest.approx(34, abs=0.5)
    assert report.candidates[1].fidelity[0].psnr_db is None
    assert result.reference is result.drawings["eager-fp32"]
    assert report.case.flops == {ComponentName.UNET: 7}
    assert [record.flops_per_s for record in report.roofline] == [1e11]
    assert report.case.inputs_digest == "cd" * 32
    assert (report.method.settle_window, report.method.most_warm_up, report.method.suite) == (3, 20, "nightly")
    for process in report.candidates[0].processes:
        assert (process.conditions.clock_steps, process.conditions.throttled) == (1, 0)
    assert report.notes == ("the components of eager-bf16 were not compared: no room",)
    assert [set(candidate.errors) for candidate in report.candidates] == [
        {ComponentName.UNET},
        {ComponentName.UNET},
        set(),
    ]
    assert report.audits == {
        "engines": {
            ComponentName.UNET: "bf16 on openvino; opset 23, 90 nodes, Attention in 8 of 8 attention layers; "
            "parity error not checked"
        }
    }
    # Engines read the graph; torch reads weights, of which this manifest has none.
    assert [candidate.size_bytes for candidate in report.candidates] == [5, 0, 0]


def test_a_candidate_that_draws_nan_fails_and_its_times_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, fakes = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32", nan="engines")
    engines, eager = result.report.candidates
    assert (engines.status, eager.status) == (Status.FAILED, Status.OK)
    assert "NaN" in engines.message
    assert engines.samples_of(Stage.END_TO_END) == ((100 * MS, 110 * MS),)
    assert engines.fidelity == ()
    assert fakes.launched.count("engines") == 1
    assert set(result.drawings) == {"eager-fp32"}


def test_a_roof_that_cannot_be_measured_takes_nothing_from_the_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, _ = run_fakes(monkeypatch, tmp_path, {"roofline": SdoptError("no memory")}, "eager-fp32")
    assert result.report.roofline == ()
    assert result.report.notes == ("the roofline was not measured: no memory",)
    assert all(candidate.status is Status.OK for candidate in result.report.candidates)


def test_layers_are_those_of_the_engines_and_only_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = LayerRecord(component=ComponentName.UNET, layer="conv_in", relative_error=0.1, tolerance=0.2)
    tables = LayerTables((layer,), "the graph ran on another runtime")
    monkeypatch.setattr(run_module, "measure_layers", lambda *args: tables)
    asked, _ = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32", layers=True)
    assert [candidate.layers for candidate in asked.report.candidates] == [(layer,), ()]
    assert asked.report.notes == (tables.remark,)
    usual, _ = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32")
    assert [candidate.layers for candidate in usual.report.candidates] == [(), ()]


def test_the_scope_of_the_unet_draws_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, fakes = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32", scope=Scope.UNET)
    assert fakes.launched == ["engines", "torch-fp32", "torch-fp32", "engines"]
    assert fakes.targets == {"sdopt.bench.measure.unet:measure_unet"}
    assert result.report.case.scope is Scope.UNET
    assert (result.reference, dict(result.drawings)) == (None, {})


def test_the_guidance_of_the_request_is_that_of_the_scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, _ = run_fakes(monkeypatch, tmp_path, {}, "", guidance_scale=0.0)
    assert asked.report.case.guidance_scale == 0
    usual, _ = run_fakes(monkeypatch, tmp_path, {}, "")
    assert usual.report.case.guidance_scale == VerifySettings().guidance_scale


def test_a_failure_is_a_row_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures = {
        "torch-bf16": SdoptError("did not finish in the time it was given"),
        "engines": MissingDependency.of("openvino", extra="cpu"),
    }
    result, fakes = run_fakes(monkeypatch, tmp_path, failures, "eager-fp32,eager-bf16")
    engines, eager, bf16 = result.report.candidates
    assert (engines.status, eager.status, bf16.status) == (Status.SKIPPED, Status.OK, Status.FAILED)
    assert "sdopt[cpu]" in engines.message
    assert "did not finish" in bf16.message
    assert fakes.launched.count("torch-bf16") == fakes.launched.count("engines") == 1
    assert fakes.launched.count("torch-fp32") == 2
    assert set(result.drawings) == {"eager-fp32"}


def test_without_eager_the_reference_is_drawn_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, fakes = run_fakes(monkeypatch, tmp_path, {}, "")
    assert fakes.launched == ["engines", "engines", "reference", "noise-floor"]
    assert result.report.candidates[0].fidelity
    assert result.reference is not None


def test_without_a_reference_nothing_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures = {"torch-fp32": SdoptError("no memory"), "reference": SdoptError("no memory")}
    result, _ = run_fakes(monkeypatch, tmp_path, failures, "eager-fp32")
    assert result.reference is None
    assert result.report.candidates[0].status is Status.OK
    assert result.report.candidates[0].fidelity == ()
    assert any("no memory" in note for note in result.report.notes)


def test_a_neighbour_is_noticed_and_the_benchs_own_work_is_not() -> None:
    before = read_cpu_use()
    later = CpuUse(before.at_s - 10, before.busy_s - 20, before.own_s - 15)
    assert measure_machine(later).conditions.neighbours_cores == pytest.approx(0.5, abs=0.1)
    assert measure_machine(later).conditions.was_shared
    alone = CpuUse(before.at_s - 10, before.busy_s - 20, before.own_s - 20)
    assert measure_machine(alone).conditions.neighbours_cores < 0.1
