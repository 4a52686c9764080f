"""TensorRT as a backend: whether it runs here, and opening a component's plans on the GPU."""

from __future__ import annotations

from sdopt.backends.cuda import find_gpu, shared_gpu
from sdopt.backends.protocol import ComponentFiles, Session
from sdopt.backends.tensorrt.loading import load_library
from sdopt.backends.tensorrt.session import TensorRTSession
from sdopt.errors import MissingHardware
from sdopt.model.backend_settings import TensorRTSettings


class TensorRTBackend:
    """Plans are built by `sdopt.convert.plans`; without a GPU this backend builds and does not open."""

    def __init__(self, settings: TensorRTSettings) -> None:
        self._settings = settings
        self._library = load_library(settings.kind)

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
