"""Stands for a TensorRT module and for the GPU, on the CPU, so that sessions can be tested without either.

It has the names of the real API (a test compares them with `tensorrt_rtx` where that is installed) and none of its
kernels: a plan is a JSON text that lists tensors and profiles, and running one reads its inputs and writes its outputs
at the addresses that were bound, so that a wrong address, shape or type shows in the numbers.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntFlag
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sdopt.backends.cuda import Arena
from sdopt.model.component import ComponentSpec, TensorSpec
from sdopt.model.precision import DType
from sdopt.model.shape import Extent

_NAMES = {DType.FP32: "FLOAT", DType.FP16: "HALF", DType.INT64: "INT64"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
HEADER_BYTES = 64


class HostGpu:
    """`sdopt.backends.cuda.Gpu` in host memory: what is queued runs at once. `log` is what happened, in order."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stream_handle = 77
        self.arena = Arena(self)  # type: ignore[arg-type]
        self.log: list[str] = []
        self.turns = 0
        self.capturing = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield

    def give(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        self.capturing = True
        queue()
        self.capturing = False

        def replay() -> None:
            self.log.append("replay")
            queue()

        return replay

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # Full of what must not be seen in any result.
        return torch.full(shape, 99, dtype=dtype)

    def wait(self) -> None:
        self.log.append("wait")


def make_plan(
    spec: ComponentSpec, profiles: list[dict[str, Extent]], *, scratch_bytes: int = 4096, **more: Any
) -> bytes:
    """A plan of the double. `profiles` are its optimisation profiles; `more` overrides what the engine says."""
    extents = {axis: Extent.covering([each[axis] for each in profiles]) for axis in profiles[0]}

    def bounds(tensor: TensorSpec) -> list[list[list[int]]]:
        return [
            [[axis if isinstance(axis, int) else getattr(each[axis], bound) for axis in tensor.axes]
             for bound in ("min", "opt", "max")]
            for each in profiles
        ]  # fmt: skip

    def shape(tensor: TensorSpec) -> list[int]:
        sizes = (Extent.static(axis) if isinstance(axis, int) else extents[axis] for axis in tensor.axes)
        return [size.min if size.is_static else -1 for size in sizes]

    tensors = {
        tensor.name: {
            "dtype": _NAMES[tensor.dtype], "shape": shape(tensor), "bounds": bounds(tensor),
            "axes": list(tensor.axes), "input": tensor in spec.inputs,
        }
        for tensor in (*spec.inputs, *spec.outputs)
    }  # fmt: skip
    table = {"tensors": tensors, "profiles": len(profiles), "scratch_bytes": scratch_bytes, "weights_bytes": 1000}
    return f"{'double':<{HEADER_BYTES}}".encode() + json.dumps(table | more).encode()


class EngineInvalidityDiagnostics(IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


EngineValidity = Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
EngineStat = Enum("EngineStat", "TOTAL_WEIGHTS_SIZE STRIPPED_WEIGHTS_SIZE")
CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
DynamicShapesKernelSpecializationStrategy = Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")


class ILogger:
    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def __init__(self) -> None:
        pass


class IRuntimeCache:
    """The kernels in it are the shapes that ran."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.refuses = False

    def deserialize(self, blob: bytes) -> bool:
        if self.refuses:
            return False
        self.kernels = json.loads(blob)
        return True

    def serialize(self) -> bytes:
        return json.dumps(self.kernels).encode()


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._allocation

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache


class Runtime:
    """`made` are the engines that it made; the class's `validity` and `message` say how it answers."""

    engine_header_size = HEADER_BYTES
    validity: Any = (EngineValidity.VALID, 0)
    message = ""
    made: list[ICudaEngine]
    allocation_fails = False

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def get_engine_validity(self, buffer: Any) -> Any:
        assert len(buffer) == HEADER_BYTES
        if self.message:
            self._logger.log(ILogger.Severity.ERROR, self.message)
        return self.validity

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        if self.message:
            self._logger.log(ILogger.Severity.INFO, "Loaded engine")
            self._logger.log(ILogger.Severity.ERROR, self.message)
            return None
        engine = ICudaEngine(json.loads(bytes(serialized_engine[HEADER_BYTES:])), self._logger)
        type(self).made.append(engine)
        return engine


class ICudaEngine:
    def __init__(self, table: dict[str, Any], logger: Any) -> None:
        self.table, self._logger = table, logger
        self.contexts: list[IExecutionContext] = []
        self._budget = int(table.get("streamable_bytes", 0))

    @property
    def num_io_tensors(self) -> int:
        return len(self.table["tensors"])

    @property
    def num_optimization_profiles(self) -> int:
        return int(self.table["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        return int(self.table["scratch_bytes"])

    @property
    def streamable_weights_size(self) -> int:
        return int(self.table.get("streamable_bytes", 0))

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size: int) -> None:
        assert not self.contexts
        self._budget = size

    def get_weight_streaming_automatic_budget(self) -> int:
        return int(self.table["automatic_budget"])

    def get_engine_stat(self, stat: Any) -> int:
        assert stat is EngineStat.TOTAL_WEIGHTS_SIZE
        return int(self.table["weights_bytes"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.table["tensors"])[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.table["tensors"][name]["dtype"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.table["tensors"][name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.table["tensors"][name]["bounds"][profile_index]]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        if Runtime.allocation_fails:
            self._logger.log(ILogger.Severity.ERROR, "no context today")
            return None
        context = IExecutionContext(self, runtime_config, self._logger)
        self.contexts.append(context)
        return context


class IExecutionContext:
    """Every output is the sum of the means of the inputs, plus its number among the outputs."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig, logger: Any) -> None:
        self._engine, self.config, self._logger = engine, config, logger
        self.profile = 0
        self.memory = (0, 0)
        self.addresses: dict[str, int] = {}
        self.shapes = {name: tuple(each["shape"]) for name, each in engine.table["tensors"].items() if each["input"]}
        self.runs = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        strategy = self.config.get_execution_context_allocation_strategy()
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert memory
        assert size >= self._engine.device_memory_size_v2
        self.memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 77
        self.profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self.profile)
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self._logger.log(ILogger.Severity.ERROR, f"{name} does not satisfy any optimization profiles")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if -1 in shape]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        sizes = {"tokens": 77}
        for known, shape in self.shapes.items():
            axes = self._engine.table["tensors"][known]["axes"]
            sizes |= {axis: size for axis, size in zip(axes, shape, strict=True) if isinstance(axis, str)}
        for side in ("height", "width"):
            sizes.setdefault(side, 8 * sizes.get(f"latent_{side}", 0))
        axes = self._engine.table["tensors"][name]["axes"]
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in self._engine.table["tensors"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 77
        if "fails" in self._engine.table:
            self._logger.log(ILogger.Severity.ERROR, self._engine.table["fails"])
            return False
        self.runs += 1
        address, size = self.memory
        if self._engine.device_memory_size_v2:
            ctypes.memset(address, self.runs % 256, size)
        tensors = self._engine.table["tensors"]
        total = sum(float(self._view(name).astype(np.float64).mean()) for name in self.shapes)
        for number, name in enumerate(name for name in tensors if not tensors[name]["input"]):
            self._view(name)[...] = total + number
        cache = self.config.get_runtime_cache()
        if cache is not None and (kernel := str(sorted(self.shapes.items()))) not in cache.kernels:
            cache.kernels.append(kernel)
        return True

    def _view(self, name: str) -> Any:
        shape, dtype = self.get_tensor_shape(name), np.dtype(_NUMPY[self._engine.table["tensors"][name]["dtype"]])
        count = int(np.prod(shape, dtype=np.int64))
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(buffer, dtype).reshape(shape)


def make_library(version: str = "1.7.1.116") -> Any:
    """A fresh module: what a test sets on its `Runtime` is gone with it."""

    class FreshRuntime(Runtime):
        made: list[ICudaEngine] = []  # noqa: RUF012

    return SimpleNamespace(
        __version__=version, ILogger=ILogger, Runtime=FreshRuntime, ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext, IRuntimeCache=IRuntimeCache, IRuntimeConfig=IRuntimeConfig,
        EngineValidity=EngineValidity, EngineInvalidityDiagnostics=EngineInvalidityDiagnostics, EngineStat=EngineStat,
        CudaGraphStrategy=CudaGraphStrategy, ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
    )  # fmt: skip
