"""One optimisation profile of an engine, ready to run: an execution context, its buffers, its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdopt.backends.cuda import Gpu
from sdopt.backends.tensorrt.engine import LoadedEngine
from sdopt.errors import BackendError
from sdopt.model.component import ComponentSpec
from sdopt.weights.to_torch import TORCH_DTYPES

Shapes = tuple[tuple[int, ...], ...]


class BoundContext:
    """Inputs are copied into buffers whose addresses stay, because a captured graph runs on addresses.

    A context for each optimisation profile: to change a context from which a graph was captured is undefined.
    `runtime_config` is an `IRuntimeConfig` of the engine, with user-managed memory: that of the arena.
    """

    def __init__(
        self, loaded: LoadedEngine, spec: ComponentSpec, gpu: Gpu, runtime_config: Any, profile: int, *, capture: bool
    ) -> None:
        self._loaded, self._spec, self._gpu, self._profile = loaded, spec, gpu, profile
        gpu.arena.reserve(loaded.scratch_bytes)
        self._arena_version = gpu.arena.version
        self._context = loaded.engine.create_execution_context(runtime_config)
        if self._context is None:
            raise self._failure("make a context for")
        if loaded.scratch_bytes:
            self._context.set_device_memory(gpu.arena.address, gpu.arena.size_bytes)
        if profile and not self._context.set_optimization_profile_async(profile, gpu.stream_handle):
            raise self._failure(f"choose the optimisation profile {profile} of")
        self._dynamic = {t.name for t in spec.inputs if -1 in tuple(loaded.engine.get_tensor_shape(t.name))}
        self._captures = capture and not self._has_range()
        self._shapes: Shapes | None = None
        self._extra: Mapping[str, torch.Tensor] | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._replay: Callable[[], None] | None = None

    @property
    def is_current(self) -> bool:
        """False once the arena has moved: the context has the address of memory that is gone."""
        return self._arena_version == self._gpu.arena.version

    @property
    def buffers_bytes(self) -> int:
        return sum(t.nbytes for t in (*self._inputs.values(), *self._outputs.values()))

    def run(self, inputs: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inside a turn of the GPU: queue one run; the outputs are the caller's own. The host does not wait.

        `extra` are inputs that are read where they are: the same mapping as before means the same tensors.
        """
        shapes = tuple(tuple(inputs[tensor.name].shape) for tensor in self._spec.inputs)
        if shapes != self._shapes or extra is not self._extra:
            self._place(extra)
            self._bind(shapes)
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if self._replay is not None:
            self._replay()
        else:
            self._queue()
            if self._captures:
                # After one run: the first initialises libraries, which a capture must not see.
                self._replay = self._gpu.capture(self._queue)
        return {name: self._gpu.give(value) for name, value in self._outputs.items()}

    def _place(self, extra: Mapping[str, torch.Tensor]) -> None:
        for name, value in extra.items():
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise self._failure(f"take {name} of the shape {tuple(value.shape)} in")
            if not self._context.set_tensor_address(name, value.data_ptr()):
                raise self._failure(f"bind {name} of")
        # What was captured has the old addresses in it.
        self._extra, self._replay = extra, None

    def _bind(self, shapes: Shapes) -> None:
        context = self._context
        for tensor, shape in zip(self._spec.inputs, shapes, strict=True):
            if tensor.name in self._dynamic and not context.set_input_shape(tensor.name, shape):
                raise self._failure(f"take {tensor.name} of the shape {shape} in")
        if unknown := context.infer_shapes():
            raise self._failure(f"infer the shapes of {', '.join(unknown)} in")
        self._inputs = {
            tensor.name: self._gpu.empty(shape, TORCH_DTYPES[tensor.dtype])
            for tensor, shape in zip(self._spec.inputs, shapes, strict=True)
        }
        self._outputs = {
            tensor.name: self._gpu.empty(tuple(context.get_tensor_shape(tensor.name)), TORCH_DTYPES[tensor.dtype])
            for tensor in self._spec.outputs
        }
        for name, buffer in (self._inputs | self._outputs).items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise self._failure(f"bind {name} of")
        self._shapes = shapes

    def _queue(self) -> None:
        if not self._context.execute_async_v3(self._gpu.stream_handle):
            raise self._failure("run")

    def _has_range(self) -> bool:
        """Whether this profile takes more than one shape: then a graph would have to be captured for each."""
        engine = self._loaded.engine
        bounds = (engine.get_tensor_profile_shape(name, self._profile) for name in self._dynamic)
        return any(tuple(least) != tuple(most) for least, _, most in bounds)

    def _failure(self, what: str) -> BackendError:
        flavour, said = self._loaded.record.flavour, self._loaded.messages.text
        return BackendError(f"{flavour} cannot {what} {self._spec.name}: {said}")
