"""The settings' type picks the backend; its leaf module is imported only here."""

from __future__ import annotations

from sdopt.backends.protocol import Backend, ComponentFiles, Session
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
)


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
    """Open a component on the backend of `settings`; one with LoRA slots can have them filled."""
    if component.slots is None or isinstance(settings, TorchSettings):
        return backend_for(settings).open(component)
    from sdopt.backends.slotted_session import SlottedSession

    return SlottedSession(component, settings, lambda files, own: backend_for(own).open(files))
