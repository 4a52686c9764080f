"""Whether each runtime runs here, by the runtime alone: torch is loaded only to look at a GPU.

A planner asks this, and must not wait seconds for a library that computes nothing for it.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, assert_never

from sdopt.backends.protocol import Probe
from sdopt.backends.tensorrt.loading import load_library
from sdopt.errors import MissingDependency, SdoptError, text_with_trace
from sdopt.machine.library_pairs import explain_failure
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
)
from sdopt.model.precision import Precision
from sdopt.processes.call import How, call

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


EVERY_BACKEND: tuple[BackendSettings, ...] = (
    TorchSettings(), OnnxRuntimeSettings(), OpenVINOSettings(), OnnxRuntimeSettings(device="cuda"),
    TensorRTSettings(kind="tensorrt-rtx"), TensorRTSettings(kind="tensorrt"),
)  # fmt: skip
"""Every runtime that there is a target for, and torch, which is measured against."""
_PROBE_TIMEOUT_S = 120.0


def probe_all() -> tuple[Probe, ...]:
    """Probe each backend in a fresh process: a library that raises, aborts or hangs when imported is an answer."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(_probe_apart, EVERY_BACKEND))


@dataclass(frozen=True)
class ProbeJob:
    settings: BackendSettings


def _probe_apart(settings: BackendSettings) -> Probe:
    try:
        return call(probe_in_child, ProbeJob(settings), how=How.FRESH, timeout_s=_PROBE_TIMEOUT_S).value
    except SdoptError as error:
        return _describe_broken(settings, error)


def probe_in_child(job: ProbeJob) -> Probe:
    """Probe, and import the library for real: a version in the metadata does not say that it works."""
    if isinstance(job.settings, TorchSettings):
        importlib.import_module("torch")
    return probe_backend(job.settings)


def _describe_broken(settings: BackendSettings, error: SdoptError) -> Probe:
    """What a library that cannot be imported says last, and the pair of packages behind it, if one is known."""
    text = text_with_trace(error)
    cause = explain_failure(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ended = "ended with" in lines[0]
    what = f"its process {lines[0].partition(' ended ')[2]}" if ended else lines[-1]
    return Probe(
        _name(settings), "", (), missing=f"it does not work: {what[:200]}",
        remedy=cause.command if cause else f"pip show {settings.kind}: install another version of it, or remove it",
    )  # fmt: skip


def _name(settings: BackendSettings) -> str:
    on_cuda = isinstance(settings, OnnxRuntimeSettings) and settings.device == "cuda"
    return "onnxruntime on cuda" if on_cuda else settings.kind


def fastest_cpu_settings(precision: Precision) -> BackendSettings:
    """What `--target cpu` means here: OpenVINO in bf16 where the processor has it, else in fp32, else ONNX Runtime."""
    return choose_cpu_settings(probe_backend(OpenVINOSettings()), precision)


def choose_cpu_settings(openvino: Probe, precision: Precision) -> BackendSettings:
    """The same by what a probe of OpenVINO said."""
    if not openvino.available:
        return OnnxRuntimeSettings()
    if precision in (Precision.AUTO, Precision.BF16) and Precision.BF16 in openvino.precisions:
        return OpenVINOSettings(inference_precision=Precision.BF16)
    return OpenVINOSettings(inference_precision=Precision.FP32)


def load_openvino() -> Any:
    """The module. Raises `MissingDependency`."""
    return _load("openvino")


def load_onnxruntime() -> Any:
    """The module. Raises `MissingDependency`."""
    return _load("onnxruntime")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise MissingDependency.of(name, extra="cpu") from error
        raise _broken(name, error) from error
    except Exception as error:  # a library of its own that is missing, or of another version
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> MissingDependency:
    said = " ".join(str(error).split())
    return MissingDependency(
        f"{name} is installed and cannot be imported: {said[:300]}", hint=f"pip install --force-reinstall {name}"
    )


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
