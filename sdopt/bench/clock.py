"""Time the stages of a pipeline by wrapping its sessions. Nothing of the pipeline is patched.

A session returns CPU tensors, so its work is done when it returns. A backend whose work goes on behind the
call has to wait for its device in `run`, or its time would be counted as overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sdopt.backends.protocol import MemoryUse, Session
from sdopt.bench.report import Stage
from sdopt.model.component import ComponentName, ComponentSpec
from sdopt.model.shape import Extent

if TYPE_CHECKING:
    import torch

_STAGES = {
    ComponentName.TEXT_ENCODER: Stage.TEXT_ENCODER,
    ComponentName.TEXT_ENCODER_2: Stage.TEXT_ENCODER,
    ComponentName.UNET: Stage.UNET_STEP,
    ComponentName.VAE_DECODER: Stage.VAE_DECODER,
    ComponentName.VAE_ENCODER: Stage.VAE_ENCODER,
}


class Clock:
    """Collects samples of every stage in ns. `now_ns` is a monotonic clock."""

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self._samples_ns: dict[Stage, list[int]] = {}

    def wrap(self, session: Session) -> Session:
        """The session, with each run timed."""
        return TimedSession(session, self)

    def time_call(self, stage: Stage, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        start_ns = self._now_ns()
        result = call()
        self._samples_ns.setdefault(stage, []).append(self._now_ns() - start_ns)
        return result

    def time_picture(self, draw: Callable[[], object]) -> int:
        """Time one call of the pipeline, in ns: a sample end to end, and what lies outside the networks as
        overhead.
        """
        before_ns = self._network_ns()
        start_ns = self._now_ns()
        draw()
        whole_ns = self._now_ns() - start_ns
        self._samples_ns.setdefault(Stage.END_TO_END, []).append(whole_ns)
        overhead_ns = whole_ns - (self._network_ns() - before_ns)
        self._samples_ns.setdefault(Stage.OVERHEAD, []).append(overhead_ns)
        return whole_ns

    def take(self) -> dict[Stage, tuple[int, ...]]:
        """The samples so far, and start anew: what is taken and dropped is the warm-up."""
        taken = {stage: tuple(self._samples_ns[stage]) for stage in Stage if stage in self._samples_ns}
        self._samples_ns = {}
        return taken

    def _network_ns(self) -> int:
        stages = self._samples_ns.keys() - {Stage.END_TO_END, Stage.OVERHEAD}
        return sum(sum(self._samples_ns[stage]) for stage in stages)


class TimedSession:
    """A session whose runs a clock times; everything else is the session's own."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self._session, self._clock = session, clock
        self._stage = _STAGES[session.spec.name]

    @property
    def spec(self) -> ComponentSpec:
        return self._session.spec

    @property
    def extents(self) -> Mapping[str, Extent]:
        return self._session.extents

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._clock.time_call(self._stage, lambda: self._session.run(inputs))

    def memory(self) -> MemoryUse:
        return self._session.memory()

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
