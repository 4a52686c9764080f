"""Pictures on a GPU: those of torch, without a wait in the loop, and with their memory counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdopt
from sdopt.backends.cuda import GpuIdentity
from sdopt.backends.probes import probe_backend
from sdopt.fidelity.metrics import compute_psnr
from sdopt.machine.device_memory import sample_device_memory
from sdopt.model.backend_settings import OnnxRuntimeSettings, TensorRTSettings
from sdopt.pipeline.load import close_engines
from tests.conftest import build_once

PROMPT = "a large red circle on a blue background, left"
TARGETS: dict[str, Any] = {
    "rtx": TensorRTSettings(kind="tensorrt-rtx"), "tensorrt": TensorRTSettings(kind="tensorrt"),
    "cuda": OnnxRuntimeSettings(device="cuda"),
}  # fmt: skip


def convert(target: str, shared_folder: Path) -> Path:
    return build_once(shared_folder / f"pipeline-{target}", shared_folder / "cache", "--target", target)


@pytest.fixture(scope="module", params=TARGETS)
def pipe(
    request: pytest.FixtureRequest, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    probe = probe_backend(TARGETS[request.param])
    if not probe.available:
        pytest.skip(f"{probe.missing}: {probe.remedy}")
    with pytest.MonkeyPatch.context() as patch:
        # Plans are trusted where the store that built them says so.
        patch.setenv("SDOPT_CACHE", str(shared_folder / "cache"))
        loaded = sdopt.load(convert(request.param, shared_folder), scheduler="ddim")
        loaded.set_progress_bar_config(disable=True)
        yield loaded
        close_engines(loaded)


def draw(pipe: Any, seed: int = 3, **arguments: Any) -> np.ndarray[Any, Any]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(PROMPT, num_inference_steps=10, generator=generator, **arguments).images[0])


def test_the_picture_is_that_of_the_cpu(pipe: Any, pristine_bundle: Path) -> None:
    on_cpu = sdopt.load(pristine_bundle, scheduler="ddim")
    on_cpu.set_progress_bar_config(disable=True)
    assert pipe.device.type == "cuda"
    assert compute_psnr(draw(on_cpu), draw(pipe)) > 30
    close_engines(on_cpu)


def test_the_same_seed_is_the_same_picture_and_another_is_not(pipe: Any) -> None:
    assert np.array_equal(draw(pipe), draw(pipe))
    assert not np.array_equal(draw(pipe), draw(pipe, seed=4))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_waits_for_nothing_within_the_loop(pipe: Any, request: pytest.FixtureRequest) -> None:
    if "cuda" in request.node.callspec.id:
        pytest.skip("ONNX Runtime waits at the end of each run")
    draw(pipe)

    def watch(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("error" if step < pipeline.num_timesteps - 1 else "default")
        return state

    try:
        draw(pipe, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_given_out_is_ready_for_the_stream_that_asks(pipe: Any) -> None:
    session = pipe.unet.session
    inputs = {
        tensor.name: torch.rand(tensor.shape(session.extents), device="cuda").to(
            torch.float16 if tensor.dtype == "fp16" else torch.float32
        )
        for tensor in session.spec.inputs
    }
    expected = session.run(inputs)["out_sample"].cpu()
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            doubled = session.run({name: value * 1 for name, value in inputs.items()})["out_sample"] * 2
        stream.synchronize()
        assert torch.equal(doubled.cpu(), expected * 2)


def test_memory_is_counted(pipe: Any, gpu: GpuIdentity) -> None:
    with sample_device_memory(gpu.uuid) as peak:
        draw(pipe)
    if peak.peak_bytes is not None:
        assert peak.peak_bytes > 0
    device = pipe.unet.session.memory().device
    if device is not None:
        assert device.weights_bytes > 0
        assert device.activations_bytes > 0
        assert device.buffers_bytes > 0
