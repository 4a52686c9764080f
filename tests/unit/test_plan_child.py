"""A plan's child process and its record: what the build held of a GPU, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sdopt.cli.inspect import inspect
from sdopt.convert.plans import build as child
from sdopt.convert.plans.build import JOB, PlanJob, Rung, build_in_child
from sdopt.machine.device_memory import DeviceMemoryPeak
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from tests.planted_plans import make_machine, make_plan, make_plan_file, write_plan_bundle


def build(kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = True) -> dict[str, Any]:
    """Build with a builder that takes no time and 700 bytes of a GPU."""

    @contextmanager
    def sample(uuid: str) -> Iterator[DeviceMemoryPeak]:
        peak = DeviceMemoryPeak()
        yield peak
        peak.see(700)

    audit = make_plan().audit
    monkeypatch.setattr(child, "sample_device_memory", sample)
    monkeypatch.setattr(child, "find_gpus", lambda: make_machine("sm89" if gpu else None).gpus)
    monkeypatch.setattr(child, "_build", lambda job: ("0" * 64, audit, "10.13"))
    job = PlanJob(
        kind=kind, component=ComponentName.UNET, precision=Precision.FP16, graph=folder / "model.onnx",
        weights=folder / "weights.safetensors", output=folder / "engine.plan", generation="sm89", profiles=(),
        attention_layers=1, native=True, require_fused=False, rung=Rung("one at a time"), memory_limit_bytes=None,
        timing_cache=None,
    )  # fmt: skip
    return build_in_child(JOB.dump_python(job, mode="json"))


def test_general_tensorrt_is_watched_on_the_gpu_that_it_builds_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build("tensorrt", tmp_path, monkeypatch)["build_peak_device_bytes"] == 700


def test_a_build_ahead_of_time_uses_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build("tensorrt-rtx", tmp_path, monkeypatch)["build_peak_device_bytes"] is None
    assert build("tensorrt", tmp_path, monkeypatch, gpu=False)["build_peak_device_bytes"] is None


@pytest.mark.parametrize(("peak_bytes", "words"), [(1_234_567, ", with at most 1.2 MB of a GPU"), (None, "")])
def test_inspect_shows_the_gpu_memory_of_a_build_that_used_one(
    peak_bytes: int | None, words: str, tmp_path: Path
) -> None:
    plan = make_plan(build_peak_device_bytes=peak_bytes)
    write_plan_bundle(tmp_path / "bundle", {plan.file: make_plan_file()}, [plan])
    result = CliRunner().invoke(inspect, [str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stderr.split())
    assert f"built in 1.0 s (side by side){words}" in text
    assert ("of a GPU" in text) is bool(words)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"fused_kernels": 0, "attention_fused": False}, "attention 1 of 1 native, 0 of 1 fused;"),
        ({"fused_kernels": 1}, "1 of 1 fused;"),
        ({}, "all fused by the builder's word, no kernel seen;"),
        ({"attention_fused": False}, "not all fused;"),
    ],
)
def test_inspect_claims_no_more_kernels_than_were_seen(found: dict[str, Any], words: str, tmp_path: Path) -> None:
    plan = make_plan()
    plan = plan.model_copy(update={"audit": plan.audit.model_copy(update=found)})
    write_plan_bundle(tmp_path / "bundle", {plan.file: make_plan_file()}, [plan])
    result = CliRunner().invoke(inspect, [str(tmp_path / "bundle")])
    assert words in " ".join(result.stderr.split())
