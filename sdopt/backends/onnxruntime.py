"""ONNX Runtime on the CPU or on an NVIDIA GPU.

On the CPU it has no bf16 path, and runs the native `Attention` as one kernel. On a GPU `Attention` of opset 23 is one
kernel too since microsoft/onnxruntime#27542 of March 2026; 1.24 still ran it unfused, or on the CPU (#28025). Which one
is right depends on the graph: `sdopt.backends.cuda_operators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdopt.backends.cuda import Gpu, shared_gpu
from sdopt.backends.cuda_operators import CudaGraph
from sdopt.backends.engine_session import EngineSession
from sdopt.backends.probes import CUDA_PROVIDER, GET_ONNXRUNTIME_CUDA
from sdopt.backends.protocol import ComponentFiles, axis_sizes
from sdopt.errors import BackendError, MissingDependency
from sdopt.model.backend_settings import OnnxRuntimeSettings
from sdopt.model.component import TensorSpec, vae_factor
from sdopt.model.precision import DType
from sdopt.weights.dtypes import numpy_dtype
from sdopt.weights.to_torch import TORCH_DTYPES

try:
    import onnxruntime
except ImportError as error:
    raise MissingDependency.of("onnxruntime", extra="cpu") from error

_CPU, _CUDA = "CPUExecutionProvider", CUDA_PROVIDER
# Where the weights of a graph that comes as bytes lie.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeBackend:
    def __init__(self, settings: OnnxRuntimeSettings) -> None:
        self._settings = settings

    def open(self, component: ComponentFiles) -> OnnxRuntimeSession:
        if self._settings.device == "cuda":
            return self._open_on_gpu(component)
        options = onnxruntime.SessionOptions()
        if self._settings.low_memory:
            # The arena keeps what one run needed at its peak. Without the optimiser, weights stay mapped in their 16
            # bits and are widened one at a time, where it would keep a copy of all of them in fp32.
            options.enable_cpu_mem_arena = False
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return OnnxRuntimeSession(component, _open(component, options, [_CPU]))

    def _open_on_gpu(self, component: ComponentFiles) -> CudaSession:
        gpu = shared_gpu()
        cuda = {"device_id": str(gpu.device.index or 0), "user_compute_stream": str(gpu.stream_handle)}
        graph = CudaGraph(component.graph)
        cuda |= graph.provider_options()
        graph.fuse_group_norms()
        session = _open(component, onnxruntime.SessionOptions(), [(_CUDA, cuda), _CPU], graph.model.SerializeToString())
        if session.get_providers()[0] != _CUDA:
            # It falls back to the CPU without an error where a library of CUDA or cuDNN is missing.
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} could not load its CUDA libraries for {component.name}",
                hint=GET_ONNXRUNTIME_CUDA,
            )
        return CudaSession(component, session, gpu)


def _open(component: ComponentFiles, options: Any, providers: list[Any], graph: bytes | None = None) -> Any:
    """`graph` is one to run in the place of the component's, over the same weight file."""
    options.log_severity_level = 3
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(component.graph.parent))
    try:
        # A bias that is merged into the product keeps it from its INT8 kernel.
        disabled = ["MatMulAddFusion"] if b"QuantizeLinear" in component.graph.read_bytes() else []
        return onnxruntime.InferenceSession(
            graph or component.graph, options, providers=providers, disabled_optimizers=disabled
        )
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own with no common base.
        raise BackendError(f"ONNX Runtime refuses {component.graph}: {error}") from error


class OnnxRuntimeSession(EngineSession):
    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in {**self.bound, **inputs}.items()}
        names = [tensor.name for tensor in self.spec.outputs]
        try:
            outputs = self.engine.run(names, feeds)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self.spec.name}: {error}") from error
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


class CudaSession(OnnxRuntimeSession):
    """Reads and writes torch's tensors where they are. `run_with_iobinding` waits for the GPU."""

    def __init__(self, component: ComponentFiles, engine: Any, gpu: Gpu) -> None:
        super().__init__(component, engine)
        self._gpu = gpu

    @property
    def device(self) -> torch.device:
        return self._gpu.device

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes = axis_sizes(self.spec, inputs)
        outputs = {
            tensor.name: self._gpu.empty(self._shape(tensor, sizes), TORCH_DTYPES[tensor.dtype])
            for tensor in self.spec.outputs
        }
        with self._gpu.turn():
            moved = {
                name: value.detach().to(self.device, non_blocking=True).contiguous() for name, value in inputs.items()
            }
            binding = self.engine.io_binding()
            for tensor in self.spec.inputs:
                binding.bind_input(*self._place(tensor.name, tensor.dtype, moved[tensor.name]))
            for name, value in self.bound.items():
                binding.bind_input(*self._place(name, self.spec.outputs[0].dtype, value))
            for tensor in self.spec.outputs:
                binding.bind_output(*self._place(tensor.name, tensor.dtype, outputs[tensor.name]))
            try:
                self.engine.run_with_iobinding(binding)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in {self.spec.name}: {error}") from error
        return outputs

    def _place(self, name: str, dtype: DType, value: torch.Tensor) -> tuple[Any, ...]:
        """As `bind_input` and `bind_output` take it: name, device, element type, shape, address."""
        device = self._gpu.device
        shape = tuple(value.shape)
        return name, device.type, device.index or 0, numpy_dtype(dtype), shape, value.data_ptr()

    def _shape(self, tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The outputs of a VAE have sides that its inputs have not: the same picture in pixels, or in latents."""
        sides = dict(sizes)
        if {"latent_height", "height"} & set(tensor.axes) - sizes.keys():
            factor = vae_factor(self._component.config)
            for side in ("height", "width"):
                if f"latent_{side}" in sizes:
                    sides[side] = sizes[f"latent_{side}"] * factor
                else:
                    sides[f"latent_{side}"] = sizes[side] // factor
        return tuple(axis if isinstance(axis, int) else sides[axis] for axis in tensor.axes)
