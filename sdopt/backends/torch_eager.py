"""torch itself as a backend: the baseline that every engine is measured against, on the bundle's own weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdopt.artifacts.safetensors_file import read_header
from sdopt.backends.protocol import ComponentFiles, Probe
from sdopt.backends.session import EngineSession
from sdopt.model.precision import Precision
from sdopt.model.recipe import TorchSettings
from sdopt.networks.modules import build_network, default_dtype
from sdopt.networks.tensors import TORCH_DTYPES, load_weights

_COMPUTE = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


class TorchBackend:
    """`settings.compile` compiles with inductor at the first run; `attention` picks the kernel of attention."""

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings

    def probe(self) -> Probe:
        return Probe("torch", torch.__version__, (Precision.FP32, Precision.BF16))

    def open(self, component: ComponentFiles) -> TorchSession:
        with default_dtype(_COMPUTE[self._settings.precision]), init_empty_weights(include_buffers=False):
            network = build_network(component.name, component.config)
        load_weights(network, read_header(component.weights).tensors, _COMPUTE[self._settings.precision])
        return TorchSession(component, network, self._settings)


class TorchSession(EngineSession):
    def __init__(self, component: ComponentFiles, network: torch.nn.Module, settings: TorchSettings) -> None:
        super().__init__(component, torch.compile(network, dynamic=False) if settings.compile else network)
        self._settings = settings
        self._dtype = _COMPUTE[settings.precision]

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The timestep stays fp32, as in diffusers: bf16 cannot tell 997 from 999.
        arguments = [
            inputs[tensor.name].to(self._dtype)
            if tensor.dtype.is_float and tensor.name != "timestep"
            else inputs[tensor.name]
            for tensor in self.spec.inputs
        ]
        with torch.inference_mode(), self._attention():
            outputs = self.engine(*arguments)
        named = zip(self.spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        # A copy made out here is a plain tensor: inference tensors cannot be changed in place by who gets them.
        return {tensor.name: output.to(TORCH_DTYPES[tensor.dtype], copy=True) for tensor, output in named}

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        if self._settings.attention == "math":
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield
