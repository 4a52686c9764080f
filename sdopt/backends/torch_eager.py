"""torch itself as a backend: the baseline that every engine is measured against, on the bundle's own weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from accelerate import init_empty_weights

from sdopt.backends.engine_session import EngineSession
from sdopt.backends.probes import probe_backend
from sdopt.backends.protocol import ComponentFiles, DeviceMemory
from sdopt.backends.torch_attention import prefer_kernel, use_package
from sdopt.errors import MissingHardware
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.precision import DType, Precision
from sdopt.networks.modules import build_network, default_dtype
from sdopt.weights.safetensors_header import read_header
from sdopt.weights.to_torch import TORCH_DTYPES, load_weights


class TorchBackend:
    """`settings.compile` compiles with inductor at the first run; `attention` picks the kernel of attention.

    Unless the settings say otherwise, on a GPU convolutions take channels-last tensors, which tensor cores want, and
    `compile` times every kernel that it could use: what somebody would do who wants torch to be fast.
    """

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings

    def open(self, component: ComponentFiles) -> TorchSession:
        probe = probe_backend(self._settings)
        if not probe.available:
            raise MissingHardware(probe.missing, hint=probe.remedy)
        dtype = TORCH_DTYPES[DType(_fitting_precision(self._settings.precision, component))]
        device = torch.device("cuda", torch.cuda.current_device()) if self._settings.device == "cuda" else _HOST
        with default_dtype(dtype), init_empty_weights(include_buffers=False):
            network = build_network(component.name, component.config)
        tensors = read_header(component.weights).tensors if component.origin is None else component.origin
        load_weights(network, tensors, dtype, device)
        network.to(device)  # the buffers, which are not weights
        return TorchSession(component, network, self._settings, dtype, device)


_HOST = torch.device("cpu")


def _fitting_precision(precision: Precision, component: ComponentFiles) -> Precision:
    """A VAE whose config says so may overflow in fp16: diffusers computes SDXL's in fp32, and so does this.

    Not where the bundle's graph of it is in fp16, which `convert` has measured to be safe: torch, the baseline, gets
    the same advantage. The flag alone says little, for diffusers writes it into the config of every VAE.
    """
    upcast = component.name.startswith("vae") and bool(component.config.get("force_upcast"))
    measured_safe = component.spec.outputs[0].dtype is DType.FP16
    return Precision.FP32 if precision is Precision.FP16 and upcast and not measured_safe else precision


class TorchSession(EngineSession):
    def __init__(
        self, component: ComponentFiles, network: torch.nn.Module, settings: TorchSettings, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._weights_bytes = sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
        self._settings, self._dtype, self._device = settings, dtype, device
        engine: object = network
        on_gpu = device.type == "cuda"
        if on_gpu if settings.channels_last is None else settings.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        use_package(network, settings.attention, dtype, device)
        if settings.compile:
            mode = settings.compile_mode or ("max-autotune" if on_gpu else "default")
            engine = torch.compile(network, dynamic=False, mode=mode)
        super().__init__(component, engine)

    @property
    def device(self) -> torch.device:
        return self._device

    def parameters(self) -> dict[str, torch.Tensor]:
        """By their names in a weight file. What is written into them counts where nothing has run yet."""
        network = getattr(self.engine, "_orig_mod", self.engine)
        return {name.removeprefix("network."): value for name, value in network.named_parameters()}

    def use_attention(self, attention: Literal["sdpa", "math"]) -> None:
        """Compute attention by another kernel of torch's own from now on."""
        self._settings = self._settings.model_copy(update={"attention": attention})

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The timestep stays fp32, as in diffusers: bf16 cannot tell 997 from 999.
        arguments = [
            inputs[tensor.name].to(
                self._device, self._dtype if tensor.dtype.is_float and tensor.name != "timestep" else None,
                non_blocking=self._device.type == "cuda",
            )
            for tensor in self.spec.inputs
        ]  # fmt: skip
        with torch.inference_mode(), prefer_kernel(self._settings.attention), self._exact():
            outputs = self.engine(*arguments)
        named = zip(self.spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        # A copy made out here is a plain tensor: inference tensors cannot be changed in place by who gets them.
        return {
            tensor.name: output.to(TORCH_DTYPES[tensor.dtype], copy=True, memory_format=torch.contiguous_format)
            for tensor, output in named
        }

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        """fp32 on a GPU is fp32: convolutions would round to the 10 bits of TF32 otherwise."""
        if self._device.type != "cuda" or self._dtype is not torch.float32:
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield

    def _device_memory(self) -> DeviceMemory | None:
        if self._device.type != "cuda":
            return None
        return DeviceMemory(self._weights_bytes, None, 0)
