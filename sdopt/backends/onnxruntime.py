"""ONNX Runtime on the CPU. It has no bf16 path there, and runs the native `Attention` as one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdopt.backends.protocol import ComponentFiles, Probe
from sdopt.backends.session import EngineSession
from sdopt.errors import BackendError, MissingDependency
from sdopt.model.precision import Precision
from sdopt.model.recipe import OnnxRuntimeSettings

try:
    import onnxruntime
except ImportError as error:
    raise MissingDependency.of("onnxruntime", extra="cpu") from error


class OnnxRuntimeBackend:
    def __init__(self, settings: OnnxRuntimeSettings) -> None:
        self._settings = settings

    def probe(self) -> Probe:
        return Probe("onnxruntime", onnxruntime.__version__, (Precision.FP32, Precision.FP16))

    def open(self, component: ComponentFiles) -> OnnxRuntimeSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._settings.low_memory:
            # The arena keeps what one run needed at its peak. Without the optimiser, weights stay mapped in their 16
            # bits and are widened one at a time, where it would keep a copy of all of them in fp32.
            options.enable_cpu_mem_arena = False
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(component.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen classes of its own with no common base.
            raise BackendError(f"ONNX Runtime refuses {component.graph}: {error}") from error
        return OnnxRuntimeSession(component, session)


class OnnxRuntimeSession(EngineSession):
    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        names = [tensor.name for tensor in self.spec.outputs]
        try:
            outputs = self.engine.run(names, feeds)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self.spec.name}: {error}") from error
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}
