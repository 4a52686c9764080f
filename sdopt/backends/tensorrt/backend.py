"""TensorRT as a backend: whether it runs here, and opening a component's plans on the GPU."""

from __future__ import annotations

from sdopt.backends.cuda import find_gpu, shared_gpu
from sdopt.backends.protocol import ComponentFiles, Session
from sdopt.backends.tensorrt.loading import load_library
from sdopt.backends.tensorrt.session import TensorRTSession
from sdopt.bundle.again import again_command
from sdopt.bundle.plan_header import find_rtx_target
from sdopt.errors import MissingHardware
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.target import Runtime, Target


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
            target = _choose_target(self._settings, identity.generation)
            raise MissingHardware(
                f"{component.name} has no plan for this GPU ({identity.name}, {identity.generation})",
                hint=f"build one: {again_command(component.folder.parent, target=target)}",
            )
        return TensorRTSession(component, self._settings, self._library, gpu, identity)


def _choose_target(settings: TensorRTSettings, generation: str) -> Target:
    rtx = find_rtx_target(generation) if settings.kind == "tensorrt-rtx" else None
    return rtx or Target(Runtime.TENSORRT)
