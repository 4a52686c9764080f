"""The bench's order, and that a failure is a row and not a gap."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.artifacts.manifest import EnvironmentRecord
from sdopt.bench import candidates as candidates_module
from sdopt.bench import run as run_module
from sdopt.bench.candidates import Baseline, label_engines, list_candidates, parse_against
from sdopt.bench.environment import CpuUse, measure_machine, read_cpu_use
from sdopt.bench.report import Stage, Status
from sdopt.bench.run import BenchRequest, BenchResult, interleave, run_bench
from sdopt.errors import MissingDependency, SdoptError, UsageError
from sdopt.fidelity.draw import write_drawing
from sdopt.isolation import Outcome
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import (
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
    VerifySettings,
)
from sdopt.model.shape import ShapeProfile
from tests.planted_reports import BUNDLE, MS, make_drawing, make_process

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


def test_against_is_parsed_and_each_once() -> None:
    assert parse_against(" compile,eager-fp32, compile") == (Baseline.COMPILE, Baseline.EAGER_FP32)
    assert parse_against("") == ()
    with pytest.raises(UsageError, match="'eager-fp23'") as raised:
        parse_against("eager-fp23")
    assert "did you mean 'eager-fp32'" in raised.value.hint


def make_component(**values: Any) -> Any:
    return SimpleNamespace(quantization=None, is_quantized=False, **values)


def make_manifest(**records: Any) -> Any:
    bf16 = OpenVINOSettings(inference_precision=Precision.BF16)
    records = records or {"unet": make_component(backend=bf16, precision=Precision.BF16)}
    return SimpleNamespace(
        name="tiny", family="sd1", profile=ShapeProfile.static(height_px=64, width_px=64),
        profiles=(ShapeProfile.static(height_px=64, width_px=64),), files={},
        components={ComponentName(name): record for name, record in records.items()},
        recipe=SimpleNamespace(verify=VerifySettings(prompts=PROMPTS)), model_dump_json=lambda: "{}",
    )  # fmt: skip


def test_the_label_names_every_runtime_that_of_the_unet_first() -> None:
    manifest = make_manifest(
        text_encoder=make_component(backend=OnnxRuntimeSettings(), precision=Precision.FP32),
        unet=make_component(backend=OpenVINOSettings(), precision=Precision.BF16),
        vae_decoder=make_component(backend=OnnxRuntimeSettings(), precision=Precision.FP32),
    )
    assert label_engines(manifest) == "OpenVINO bf16 + ONNX Runtime fp32"


def test_compile_without_a_compiler_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module.shutil, "which", lambda name: None)
    engines, eager, compiled = list_candidates(BUNDLE, make_manifest(), (Baseline.EAGER_FP32, Baseline.COMPILE))
    assert (engines.missing, eager.missing) == ("", "")
    assert "C++ compiler" in compiled.missing


class FakeProcesses:
    """Stands in for the child processes: what each candidate does, by its settings' kind."""

    def __init__(self, failures: dict[str, SdoptError]) -> None:
        self.launched: list[str] = []
        self._failures = failures

    def run(self, target: str, arguments: dict[str, Any], timeout_s: float) -> Outcome:
        settings = arguments["settings"]
        name = "engines" if settings is None else f"torch-{settings['precision']}"
        self.launched.append(name)
        if name in self._failures:
            raise self._failures[name]
        if arguments["output"]:
            write_drawing(make_drawing(len(PROMPTS), 0.02 * (name == "engines")), Path(arguments["output"]))
        values = make_process(0, (100, 110)).model_dump(mode="json", exclude={"position", "peak_rss_bytes"})
        return Outcome(values | {"scheduler": "PLMS"}, 400_000_000, 3 * MS)

    def draw(self, folder: Path, manifest: Any, settings: Any, scene: Any, output: Path, **_: Any) -> Any:
        self.launched.append(output.stem)
        if output.stem in self._failures:
            raise self._failures[output.stem]
        return make_drawing(len(PROMPTS))


def run_fakes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: dict[str, SdoptError], against: str
) -> tuple[BenchResult, FakeProcesses]:
    fakes = FakeProcesses(failures)
    machine = EnvironmentRecord(sdopt="0", python="3", system="", processor="", cpu_features=(), libraries={})
    monkeypatch.setattr(run_module, "run_isolated", fakes.run)
    monkeypatch.setattr(run_module, "draw_isolated", fakes.draw)
    monkeypatch.setattr(run_module, "read_manifest", lambda folder: make_manifest())
    monkeypatch.setattr(run_module, "require_sound", lambda folder, manifest: None)  # there is no bundle on disk
    monkeypatch.setattr(run_module, "require_trusted", lambda folder, manifest, named: None)
    monkeypatch.setattr(run_module, "write_scene", lambda *args: None)
    monkeypatch.setattr(run_module, "hash_file", lambda path: "cd" * 32)
    monkeypatch.setattr(run_module, "describe_machine", lambda: machine)
    return run_bench(BenchRequest(tmp_path, parse_against(against)), tmp_path), fakes


def test_a_whole_run_interleaves_and_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, fakes = run_fakes(monkeypatch, tmp_path, {}, "eager-fp32,eager-bf16")
    order = ["engines", "torch-fp32", "torch-bf16", "torch-bf16", "torch-fp32", "engines"]
    assert fakes.launched == [*order, "noise-floor"]
    report = result.report
    assert report.case.prompts == PROMPTS
    assert report.case.scheduler == "PLMS"
    assert [p.position for p in report.candidates[0].processes] == [0, 5]
    assert report.candidates[0].samples_of(Stage.END_TO_END) == ((100 * MS, 110 * MS),) * 2
    assert report.candidates[0].fidelity[0].psnr_db == pytest.approx(34, abs=0.5)
    assert report.candidates[1].fidelity[0].psnr_db is None
    assert result.reference is result.drawings["eager-fp32"]


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


def test_torch_settings_of_the_baselines() -> None:
    found = list_candidates(BUNDLE, make_manifest(), None)
    assert [c.name for c in found] == ["engines", "eager-fp32", "eager-bf16", "compile"]
    assert [c.label for c in found][1:] == ["torch eager fp32", "torch eager bf16", "torch.compile fp32"]
    assert found[3].settings == TorchSettings(compile=True)


def test_beside_engines_of_a_gpu_torch_runs_there_as_fast_as_it_can() -> None:
    backend = TensorRTSettings(kind="tensorrt-rtx")
    manifest = make_manifest(unet=make_component(backend=backend, precision=Precision.FP16, plans=()))
    found = list_candidates(BUNDLE, manifest, None)
    assert [c.label for c in found] == ["TensorRT-RTX fp16", "torch eager fp16", "torch.compile fp16"]
    assert [c.settings.device for c in found[1:]] == ["cuda", "cuda"]  # type: ignore[union-attr]
    every = list_candidates(BUNDLE, manifest, tuple(Baseline))
    assert {c.settings.device for c in every[1:]} == {"cuda"}  # type: ignore[union-attr]


def test_fp16_on_a_cpu_is_skipped_with_the_reason() -> None:
    _, fp16 = list_candidates(BUNDLE, make_manifest(), (Baseline.EAGER_FP16,))
    assert "on a GPU" in fp16.missing


def test_a_neighbour_is_noticed_and_the_benchs_own_work_is_not() -> None:
    before = read_cpu_use()
    later = CpuUse(before.at_s - 10, before.busy_s - 20, before.own_s - 15)
    assert measure_machine(later).conditions.neighbours_cores == pytest.approx(0.5, abs=0.1)
    assert measure_machine(later).conditions.was_shared
    alone = CpuUse(before.at_s - 10, before.busy_s - 20, before.own_s - 20)
    assert measure_machine(alone).conditions.neighbours_cores < 0.1
