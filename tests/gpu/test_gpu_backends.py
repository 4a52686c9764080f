"""The contract of every backend, on a GPU: the suite of tests/contract with the sessions that compute there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.contract.test_backends")

from sdopt.backends.cuda import GpuIdentity  # noqa: E402
from sdopt.backends.probes import probe_backend  # noqa: E402
from sdopt.model.backend_settings import (  # noqa: E402
    BackendSettings,
    OnnxRuntimeSettings,
    TensorRTSettings,
    TorchSettings,
)
from sdopt.model.precision import Precision  # noqa: E402
from tests.conftest import build_once  # noqa: E402
from tests.contract.test_backends import *  # noqa: E402, F403

# Settings, relative L2 distance from torch fp32 on the CPU, and what the bundle is built for.
GPU_BACKENDS: dict[str, tuple[BackendSettings, float, str]] = {
    "torch-fp32": (TorchSettings(device="cuda"), 1e-4, ""),
    "torch-fp16": (TorchSettings(device="cuda", precision=Precision.FP16), 2e-2, ""),
    "onnxruntime": (OnnxRuntimeSettings(device="cuda"), 1e-3, ""),
    "tensorrt-rtx": (TensorRTSettings(kind="tensorrt-rtx"), 2e-2, "rtx"),
    "tensorrt-rtx-generation": (TensorRTSettings(kind="tensorrt-rtx"), 2e-2, "rtx:{generation}"),
    "tensorrt": (TensorRTSettings(kind="tensorrt"), 2e-2, "tensorrt"),
    "tensorrt-without-graphs": (TensorRTSettings(kind="tensorrt", cuda_graphs=False), 2e-2, "tensorrt"),
}


@pytest.fixture(scope="module", params=GPU_BACKENDS)
def gpu_case(request: pytest.FixtureRequest, gpu: GpuIdentity) -> tuple[BackendSettings, float, str]:
    settings, tolerance, target = GPU_BACKENDS[request.param]
    probe = probe_backend(settings)
    if not probe.available:
        pytest.skip(f"{probe.missing}: {probe.remedy}")
    return settings, tolerance, target.format(generation=gpu.generation)


@pytest.fixture(scope="module")
def backend(gpu_case: tuple[BackendSettings, float, str]) -> tuple[BackendSettings, float]:
    return gpu_case[:2]


@pytest.fixture(scope="module")
def pristine_bundle(gpu_case: tuple[BackendSettings, float, str], shared_folder: Path) -> Path:
    """tiny-shapes in fp32 with graphs alone, or with plans in fp16. Built once for each target."""
    target = gpu_case[2]
    options = ["--target", target] if target else ["--target", "onnxruntime", "--precision", "fp32"]
    name = f"gpu-{target.replace(':', '-') or 'graphs'}"
    return build_once(shared_folder / name, shared_folder / "cache", *options)


def test_the_probe_says_what_runs(backend: tuple[BackendSettings, float]) -> None:
    probe = probe_backend(backend[0])
    assert probe.available
    assert probe.version[0].isdigit()
    assert Precision.FP16 in probe.precisions
    assert probe.backend.startswith(backend[0].kind)
