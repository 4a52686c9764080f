"""TensorRT as a backend: whether it runs here, and opening a component's plans on the GPU."""

from __future__ import annotations

from sdopt.backends.cuda import describe_missing_gpu, find_gpu, shared_gpu
from sdopt.backends.protocol import ComponentFiles, Probe, Session
from sdopt.backends.tensorrt.loading import load_library
from sdopt.backends.tensorrt.session import TensorRTSession
from sdopt.errors import MissingHardware
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.precision import Precision

_PRECISIONS = (Precision.FP32, Precision.BF16, Precision.FP16)


class TensorRTBackend:
    """Plans are built by `sdopt.convert.plans`; without a GPU this backend builds and does not open."""

    def __init__(self, settings: TensorRTSettings) -> None:
        self._settings = settings
        self._library = load_library(settings.kind)

    def probe(self) -> Probe:
        missing, remedy = ("", "") if find_gpu() else describe_missing_gpu()
        return Probe(self._settings.kind, self._library.__version__, _PRECISIONS, missing, remedy)

    def open(self, component: ComponentFiles) -> Session:
        """Open the plan of the first profile; the others when they are needed.

        Raises `MissingHardware` where no plan of the bundle fits this machine.
        """
        gpu, identity = shared_gpu(), find_gpu()
        assert identity is not None
        if not component.plans:
            raise MissingHardware(
                f"{component.name} has no plan for this GPU ({identity.name}, {identity.generation})",
                hint=f"build one: sdopt convert MODEL --target {_target(self._settings, identity.generation)}",
            )
        return TensorRTSession(component, self._settings, self._library, gpu, identity)


def _target(settings: TensorRTSettings, generation: str) -> str:
    return f"rtx:{generation}" if settings.kind == "tensorrt-rtx" else "tensorrt"
