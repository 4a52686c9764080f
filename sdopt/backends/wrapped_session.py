"""A session over another one, for whoever times or notes its runs: everything else stays the inner session's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sdopt.backends.protocol import MemoryUse, Session, ShowsKernels
from sdopt.model.component import ComponentSpec
from sdopt.model.shape import Extent

if TYPE_CHECKING:
    import torch


class WrappedSession:
    """Forwards every call to `inner`, which it closes with itself. Override `run`.

    It is a `ShowsKernels` where the inner session is one.
    """

    def __init__(self, inner: Session) -> None:
        self.inner = inner
        if isinstance(inner, ShowsKernels):
            # On the object and not on the class: `isinstance` asks a protocol's members of each object.
            self.integer_layers = inner.integer_layers

    @property
    def spec(self) -> ComponentSpec:
        return self.inner.spec

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def extents(self) -> Mapping[str, Extent]:
        return self.inner.extents

    @property
    def profiles(self) -> tuple[Mapping[str, Extent], ...]:
        return self.inner.profiles

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.inner.run(inputs)

    def memory(self) -> MemoryUse:
        return self.inner.memory()

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
