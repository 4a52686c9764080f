"""What a runtime must do to be a backend. Nothing here knows a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from sdopt.artifacts.manifest import PlanRecord
from sdopt.errors import ShapeError
from sdopt.model.component import ComponentName, ComponentSpec, Config
from sdopt.model.family import Family
from sdopt.model.precision import Precision
from sdopt.model.shape import Extent

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
    `plans` are the engine files beside them, by `PlanRecord.file` relative to the bundle.
    """

    folder: Path
    spec: ComponentSpec
    config: Config
    family: Family
    extents: Mapping[str, Extent]
    plans: tuple[PlanRecord, ...] = ()

    @property
    def name(self) -> ComponentName:
        return self.spec.name

    @property
    def graph(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a session holds: of its weights, and of the host process now and at its peak."""

    weights_bytes: int
    process_bytes: int
    process_peak_bytes: int


class Session(Protocol):
    """An open engine. `run` takes and returns CPU tensors by name, in the dtypes and shapes of `spec`."""

    @property
    def spec(self) -> ComponentSpec: ...

    @property
    def extents(self) -> Mapping[str, Extent]: ...

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def memory(self) -> MemoryUse: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """A runtime. CPU runtimes compile when they open a graph; one that makes plan files builds them before."""

    def probe(self) -> Probe: ...

    def open(self, component: ComponentFiles) -> Session: ...


def check_inputs(spec: ComponentSpec, extents: Mapping[str, Extent], inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse inputs that the engine was not built for: names, shapes, one size for each named axis."""
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
                    hint="build another with sdopt convert --size / --batch",
                )
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise ShapeError(
                    f"{spec.name}: axis {axis!r} is {sizes[axis]} in one input and {size} in {tensor.name}"
                )
