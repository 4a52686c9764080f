"""OpenVINO on the CPU, in fp32 or bf16. It reads opset 23 with `Attention` as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdopt.backends.protocol import ComponentFiles, Probe
from sdopt.backends.session import EngineSession
from sdopt.errors import BackendError, MissingDependency, MissingHardware
from sdopt.model.precision import Precision
from sdopt.model.recipe import OpenVINOSettings

try:
    import openvino
except ImportError as error:
    raise MissingDependency.of("openvino", extra="cpu") from error

_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}


class OpenVINOBackend:
    def __init__(self, settings: OpenVINOSettings) -> None:
        self._settings = settings

    def probe(self) -> Probe:
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precisions = (Precision.FP32, Precision.BF16) if "BF16" in capabilities else (Precision.FP32,)
        return Probe("openvino", openvino.__version__.split("-")[0], precisions)

    def open(self, component: ComponentFiles) -> OpenVINOSession:
        precision = self._settings.inference_precision
        if precision not in self.probe().precisions:
            # OpenVINO would emulate bf16 in silence, slower than fp32.
            raise MissingHardware("this processor has no bf16 arithmetic", hint="convert again with --precision fp32")
        try:
            compiled = openvino.Core().compile_model(
                component.graph, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
            )
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses {component.graph}: {error}") from error
        return OpenVINOSession(component, compiled.create_infer_request())


class OpenVINOSession(EngineSession):
    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        try:
            # Outputs are copied: the request's own buffers are written again by the next run.
            results = self.engine.infer(feeds, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed in {self.spec.name}: {error}") from error
        return {tensor.name: torch.from_numpy(results[tensor.name]) for tensor in self.spec.outputs}
