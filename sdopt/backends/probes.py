"""Whether each runtime runs here, by the runtime alone: torch is loaded only to look at a GPU.

A planner asks this, and must not wait seconds for a library that computes nothing for it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, assert_never

from sdopt.backends.protocol import Probe
from sdopt.backends.tensorrt.loading import load_library
from sdopt.errors import MissingDependency
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
)
from sdopt.model.precision import Precision

CUDA_PROVIDER = "CUDAExecutionProvider"
GET_ONNXRUNTIME_CUDA = "pip uninstall -y onnxruntime && pip install --force-reinstall 'sdopt[gpu]'"
_TENSORRT_PRECISIONS = (Precision.FP32, Precision.BF16, Precision.FP16)


def probe_backend(settings: BackendSettings) -> Probe:
    """Whether a backend runs here; a missing library is an answer, not an error."""
    try:
        match settings:
            case OpenVINOSettings():
                return _probe_openvino()
            case OnnxRuntimeSettings():
                return _probe_onnxruntime(settings)
            case TensorRTSettings():
                return _probe_tensorrt(settings)
            case TorchSettings():
                return _probe_torch(settings)
    except MissingDependency as error:
        return Probe(settings.kind, "", (), missing=error.message, remedy=error.hint)
    assert_never(settings)


def probe_all() -> tuple[Probe, ...]:
    """Every runtime that there is a target for, and torch, which is measured against."""
    every: tuple[BackendSettings, ...] = (
        TorchSettings(), OnnxRuntimeSettings(), OpenVINOSettings(), OnnxRuntimeSettings(device="cuda"),
        TensorRTSettings(kind="tensorrt-rtx"), TensorRTSettings(kind="tensorrt"),
    )  # fmt: skip
    return tuple(probe_backend(settings) for settings in every)


def fastest_cpu_settings(precision: Precision) -> BackendSettings:
    """What `--target cpu` means here: OpenVINO in bf16 where the processor has it, else in fp32, else ONNX Runtime."""
    probe = probe_backend(OpenVINOSettings())
    if not probe.available:
        return OnnxRuntimeSettings()
    if precision in (Precision.AUTO, Precision.BF16) and Precision.BF16 in probe.precisions:
        return OpenVINOSettings(inference_precision=Precision.BF16)
    return OpenVINOSettings(inference_precision=Precision.FP32)


def load_openvino() -> Any:
    """The module. Raises `MissingDependency`."""
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency.of("openvino", extra="cpu") from error
    return openvino


def load_onnxruntime() -> Any:
    """The module. Raises `MissingDependency`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency.of("onnxruntime", extra="cpu") from error
    return onnxruntime


def _probe_openvino() -> Probe:
    openvino = load_openvino()
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = (Precision.FP32, Precision.BF16) if "BF16" in capabilities else (Precision.FP32,)
    return Probe("openvino", openvino.__version__.split("-")[0], precisions)


def _probe_onnxruntime(settings: OnnxRuntimeSettings) -> Probe:
    onnxruntime = load_onnxruntime()
    precisions = (Precision.FP32, Precision.FP16)
    if settings.device == "cpu":
        return Probe("onnxruntime", onnxruntime.__version__, precisions)
    missing, remedy = "this onnxruntime was built without CUDA", GET_ONNXRUNTIME_CUDA
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        missing, remedy = _find_missing_gpu()
    return Probe("onnxruntime on cuda", onnxruntime.__version__, precisions, missing, remedy)


def _probe_tensorrt(settings: TensorRTSettings) -> Probe:
    library = load_library(settings.kind)
    return Probe(settings.kind, library.__version__, _TENSORRT_PRECISIONS, *_find_missing_gpu())


def _probe_torch(settings: TorchSettings) -> Probe:
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.BF16)
    if settings.device == "cpu":
        return Probe("torch", version("torch"), precisions)
    return Probe("torch", version("torch"), (*precisions, Precision.FP16), *_find_missing_gpu())


def _find_missing_gpu() -> tuple[str, str]:
    """(what is missing, what to do); both empty where torch can use a GPU."""
    from sdopt.backends.cuda import describe_missing_gpu, find_gpu

    return ("", "") if find_gpu() else describe_missing_gpu()
