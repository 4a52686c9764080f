"""TensorRT as a backend: whether it runs here, and opening a component's plan on the GPU."""

from __future__ import annotations

from sdopt.backends.protocol import ComponentFiles, Probe, Session
from sdopt.backends.tensorrt.library import load_library
from sdopt.errors import MissingHardware
from sdopt.model.precision import Precision
from sdopt.model.recipe import TensorRTSettings

_PRECISIONS = (Precision.FP32, Precision.BF16, Precision.FP16)


class TensorRTBackend:
    def __init__(self, settings: TensorRTSettings) -> None:
        self._settings = settings
        self._library = load_library(settings.kind)

    def probe(self) -> Probe:
        return Probe(self._settings.kind, self._library.__version__, _PRECISIONS, missing="no NVIDIA GPU")

    def open(self, component: ComponentFiles) -> Session:
        raise MissingHardware(f"{component.name} needs an NVIDIA GPU")
