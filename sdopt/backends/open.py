"""The settings' type picks the backend; its leaf module is imported only here."""

from __future__ import annotations

from sdopt.backends.protocol import Backend, ComponentFiles, Probe, Session
from sdopt.errors import MissingDependency
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
)
from sdopt.model.precision import Precision


def backend_for(settings: BackendSettings) -> Backend:
    """The backend that these settings belong to. Raises `MissingDependency` where its library is not installed."""
    match settings:
        case OpenVINOSettings():
            from sdopt.backends.openvino import OpenVINOBackend

            return OpenVINOBackend(settings)
        case OnnxRuntimeSettings():
            from sdopt.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(settings)
        case TensorRTSettings():
            from sdopt.backends.tensorrt.backend import TensorRTBackend

            return TensorRTBackend(settings)
        case TorchSettings():
            from sdopt.backends.torch_eager import TorchBackend

            return TorchBackend(settings)


def open_session(component: ComponentFiles, settings: BackendSettings) -> Session:
    """Open a component on the backend of `settings`."""
    return backend_for(settings).open(component)


def probe_backend(settings: BackendSettings) -> Probe:
    """Whether a backend runs here; a missing library is an answer, not an error."""
    try:
        return backend_for(settings).probe()
    except MissingDependency as error:
        return Probe(settings.kind, "", (), missing=error.message, remedy=error.hint)


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
