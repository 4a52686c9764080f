"""What the CUDA devices of ONNX Runtime and torch do that can be seen without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from sdopt.backends import cuda as gpu_module
from sdopt.backends.component_files import component_files
from sdopt.backends.cuda import GpuIdentity, find_gpu, shared_gpu
from sdopt.backends.onnxruntime import CudaSession, OnnxRuntimeBackend
from sdopt.backends.open import open_session
from sdopt.backends.probes import probe_backend
from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.manifest import read_manifest
from sdopt.errors import BackendError, MissingHardware
from sdopt.model.backend_settings import OnnxRuntimeSettings, TensorRTSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.trace.seeded_inputs import make_inputs
from tests.tensorrt_double import HostGpu

CUDA = OnnxRuntimeSettings(device="cuda")
IDENTITY = GpuIdentity("NVIDIA H100", "sm90", "580.65.06", "")


@pytest.fixture
def no_gpu() -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")


def files_of(folder: Path, name: ComponentName) -> ComponentFiles:
    return component_files(folder, read_manifest(folder), name)


@pytest.mark.parametrize("name", list(ComponentName))
def test_bound_memory_gives_what_plain_arrays_give(name: ComponentName, pristine_bundle: Path) -> None:
    if name is ComponentName.TEXT_ENCODER_2:
        pytest.skip("tiny-shapes has none")
    files = dataclasses.replace(files_of(pristine_bundle, name), slots=None)
    inputs = make_inputs(files.spec, files.config, files.extents)
    with open_session(files, OnnxRuntimeSettings()) as plain:
        expected = plain.run(inputs)
        bound = CudaSession(files, plain.engine, HostGpu())  # type: ignore[arg-type]
        outputs = bound.run(inputs)
    assert list(outputs) == list(expected)
    for key, value in expected.items():
        assert outputs[key].shape == value.shape
        torch.testing.assert_close(outputs[key], value)


@pytest.mark.usefixtures("no_gpu")
def test_probes_name_what_is_missing() -> None:
    for settings in (CUDA, TorchSettings(device="cuda"), TensorRTSettings(kind="tensorrt-rtx")):
        probe = probe_backend(settings)
        assert not probe.available
        assert probe.missing
        assert probe.remedy


def test_a_gpu_that_onnxruntime_cannot_use_is_no_silent_fallback(
    monkeypatch: pytest.MonkeyPatch, pristine_bundle: Path
) -> None:
    seen: list[Any] = []

    def fall_back(graph: bytes, options: Any, providers: Any, disabled_optimizers: Any) -> Any:
        seen.append(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    monkeypatch.setattr("sdopt.backends.onnxruntime.shared_gpu", HostGpu)
    with pytest.raises(BackendError, match="could not load its CUDA libraries for unet"):
        OnnxRuntimeBackend(CUDA).open(files_of(pristine_bundle, ComponentName.UNET))
    cuda = {"device_id": "0", "user_compute_stream": "77", "sdpa_kernel": "2"}
    assert seen == [[("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]]


def test_a_gpu_without_a_cuda_build_of_onnxruntime_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdopt.backends.cuda.find_gpu", lambda: IDENTITY)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    probe = probe_backend(CUDA)
    assert probe.missing == "this onnxruntime was built without CUDA"
    assert "sdopt[gpu]" in probe.remedy
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert probe_backend(CUDA).available


@pytest.mark.usefixtures("no_gpu")
def test_no_gpu_is_an_error_with_a_remedy(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingHardware) as caught:
        shared_gpu()
    assert caught.value.hint
    with pytest.raises(MissingHardware):
        open_session(files_of(pristine_bundle, ComponentName.UNET), TorchSettings(device="cuda"))
    monkeypatch.setattr(gpu_module.torch.version, "cuda", "13.0")
    with pytest.raises(MissingHardware, match="no NVIDIA GPU"):
        shared_gpu()
