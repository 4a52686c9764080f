"""What a runtime must do to be a backend. Nothing here knows a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from sdopt.bundle.again import variant_command
from sdopt.bundle.records import PlanRecord, SlotsRecord
from sdopt.errors import ShapeError
from sdopt.model.component import ComponentName, ComponentSpec, Config
from sdopt.model.family import Family
from sdopt.model.file_names import GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.precision import Precision
from sdopt.model.shape import CHUNK_TOKENS, Extent, nearest_profile
from sdopt.weights.safetensors_header import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probe:
    """Whether a backend runs here. `missing` is empty when it does; `remedy` says how to get what is missing."""

    backend: str
    version: str
    precisions: tuple[Precision, ...]
    missing: str = ""
    remedy: str = ""

    @property
    def available(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class ComponentFiles:
    """One component of a bundle, as a backend opens it.

    `folder` holds `model.onnx`, `weights.safetensors` and `config.json`; `extents` are the sizes of the named axes.
    `plans` are the engine files for this machine, by `PlanRecord.file` relative to the bundle: one for each of
    `profiles`, which are the axes of the bundle's profiles. `plan_digests` are the SHA-256 of those files by name.
    """

    folder: Path
    spec: ComponentSpec
    config: Config
    family: Family
    extents: Mapping[str, Extent]
    plans: tuple[PlanRecord, ...] = ()
    profiles: tuple[Mapping[str, Extent], ...] = ()
    plan_digests: Mapping[str, str] = field(default_factory=dict)
    graph_name: str = GRAPH_NAME
    origin: Mapping[str, TensorRef] | None = None
    """The checkpoint's tensors, for torch, where the weight file holds quantised ones."""
    slots: SlotsRecord | None = None
    """Of the graph with LoRA slots, which lies beside the other."""

    slot_plans: tuple[PlanRecord, ...] = ()
    """The engine files for this machine of the graph with slots."""
    slot_inputs: tuple[str, ...] = ()
    """Inputs of the graph beside those of `spec`, where it is the one with LoRA slots."""

    @property
    def name(self) -> ComponentName:
        return self.spec.name

    @property
    def graph(self) -> Path:
        return self.folder / self.graph_name

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_NAME


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU that a session holds.

    `activations_bytes` is what the engine needs while it runs, None where the runtime does not say: sessions that run
    in turn share the largest. `buffers_bytes` are inputs and outputs that the session keeps.
    """

    weights_bytes: int
    activations_bytes: int | None
    buffers_bytes: int


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a session holds: of its weights, and of the host process now and at its peak; and of its GPU."""

    weights_bytes: int
    process_bytes: int
    process_peak_bytes: int
    device: DeviceMemory | None = None


class Session(Protocol):
    """An open engine. `run` takes tensors by name, in the dtypes and shapes of `spec`, and returns such on `device`.

    Inputs on another device are copied there. On a GPU the outputs are ready for the stream that is current, not for
    the host: whoever reads a clock has to wait for the device first.
    """

    @property
    def spec(self) -> ComponentSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def extents(self) -> Mapping[str, Extent]: ...

    @property
    def profiles(self) -> tuple[Mapping[str, Extent], ...]:
        """What the engine was built for, one table for each profile; `extents` are the least that contain them all."""
        ...

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def memory(self) -> MemoryUse: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class ShowsKernels(Protocol):
    """A session whose runtime tells what its kernels compute in."""

    def integer_layers(self) -> int:
        """Convolutions and matrix products that the open engine computes in 8 bits."""
        ...


class Backend(Protocol):
    """A runtime. CPU runtimes compile when they open a graph; one that makes plan files builds them before."""

    def open(self, component: ComponentFiles) -> Session: ...


def check_inputs(
    spec: ComponentSpec,
    extents: Mapping[str, Extent],
    inputs: Mapping[str, torch.Tensor],
    profiles: Sequence[Mapping[str, Extent]] = (),
) -> None:
    """Refuse inputs that the engine was not built for: names, shapes, one size for each named axis, and a set of sizes
    that is in none of the `profiles`, which `extents` contain.
    """
    if inputs.keys() != {tensor.name for tensor in spec.inputs}:
        expected = ", ".join(tensor.name for tensor in spec.inputs)
        raise ShapeError(f"{spec.name} takes {expected}, not {', '.join(sorted(inputs)) or 'nothing'}")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        shape = tuple(inputs[tensor.name].shape)
        if len(shape) != len(tensor.axes):
            raise ShapeError(f"{spec.name}: {tensor.name} has the axes {tensor.axes}, not the shape {shape}")
        for axis, size in zip(tensor.axes, shape, strict=True):
            extent = Extent.static(axis) if isinstance(axis, int) else extents[axis]
            if size not in extent:
                span = str(extent.min) if extent.is_static else f"{extent.min} to {extent.max}"
                raise ShapeError(
                    f"{spec.name}: axis {axis!r} of {tensor.name} is {size}, and the engine was built for {span}",
                    hint=f"build another: {variant_command('--size WxH --batch N --tokens N')}",
                )
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise ShapeError(
                    f"{spec.name}: axis {axis!r} is {sizes[axis]} in one input and {size} in {tensor.name}"
                )
    _require_chunks(spec, sizes)
    _require_profile(spec, sizes, profiles)


def axis_sizes(spec: ComponentSpec, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size of each named axis in inputs that `check_inputs` has passed."""
    return {
        axis: size
        for tensor in spec.inputs
        for axis, size in zip(tensor.axes, inputs[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }


def _require_chunks(spec: ComponentSpec, sizes: Mapping[str, int]) -> None:
    tokens = sizes.get("prompt_tokens", CHUNK_TOKENS)
    if tokens % CHUNK_TOKENS:
        raise ShapeError(
            f"{spec.name}: the prompt has {tokens} tokens, and the engine takes multiples of {CHUNK_TOKENS}",
            hint="give the pipeline the prompt as text",
        )


def _require_profile(spec: ComponentSpec, sizes: Mapping[str, int], profiles: Sequence[Mapping[str, Extent]]) -> None:
    if not profiles or any(all(size in profile[axis] for axis, size in sizes.items()) for profile in profiles):
        return
    near = nearest_profile(profiles, sizes)
    wrong = [axis for axis, size in sizes.items() if size not in near[axis]]
    asked = " and ".join(f"{axis} {sizes[axis]}" for axis in wrong)
    built = " and ".join(f"{axis} {near[axis].clamp(sizes[axis])}" for axis in wrong)
    raise ShapeError(
        f"{spec.name}: no profile that the engine was built for has {asked}; the nearest has {built}",
        hint=f"build another: {variant_command('--size WxH')}",
    )
