"""Time the stages of a pipeline by wrapping its sessions. Nothing of the pipeline is patched.

A session on the CPU has done its work when it returns. One on a GPU has only queued it: its time is taken by events
that the GPU itself passes, so that the host waits nowhere that it would not wait without the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdopt.backends.protocol import Session
from sdopt.backends.wrapped_session import WrappedSession
from sdopt.bench.case.report import Stage
from sdopt.model.component import ComponentName

if TYPE_CHECKING:
    import torch

_STAGES = {
    ComponentName.TEXT_ENCODER: Stage.TEXT_ENCODER,
    ComponentName.TEXT_ENCODER_2: Stage.TEXT_ENCODER,
    ComponentName.UNET: Stage.UNET_STEP,
    ComponentName.VAE_DECODER: Stage.VAE_DECODER,
    ComponentName.VAE_ENCODER: Stage.VAE_ENCODER,
}


def _new_event() -> torch.cuda.Event:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Start:
    """Of a picture: by the host's clock, by the GPU's event, and how often the clock had gone back."""

    at_ns: int
    event: torch.cuda.Event | None
    steps_back: int


class Clock:
    """Collects samples of each stage in ns. `now_ns` is a monotonic clock, `new_event` makes a timing event of CUDA.

    `steps_back` counts the times that the clock went back all the same, or stood still: samples that this touched are
    dropped.
    """

    def __init__(
        self, now_ns: Callable[[], int] = time.perf_counter_ns, new_event: Callable[[], torch.cuda.Event] = _new_event
    ) -> None:
        self._read_ns, self._new_event = now_ns, new_event
        self._last_ns: int | None = None
        self._samples_ns: dict[Stage, list[int]] = {}
        self._queued: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = False
        self._start: _Start | None = None
        self.steps_back = 0

    def wrap(self, session: Session) -> Session:
        """The session, with each run timed."""
        self._on_gpu |= session.device.type != "cpu"
        return TimedSession(session, self)

    def time_call(self, stage: Stage, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        start_ns = self._now_ns()  # may find that the clock went back before: that touches no sample of this call
        steps_back = self.steps_back
        result = call()
        self._add(stage, self._now_ns() - start_ns, steps_back)
        return result

    def end_step(self) -> None:
        """To be called at the end of each denoising step: the first one of a picture is a sample of its own."""
        start, self._start = self._start, None
        if start is None:
            return
        if start.event is None:
            self._add(Stage.FIRST_STEP, self._now_ns() - start.at_ns, start.steps_back)
            return
        first = self._new_event()
        first.record()
        self._queued.append((Stage.FIRST_STEP, start.event, first))

    def time_queue(self, stage: Stage, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Time a call that queues work on a GPU's current stream: from when the GPU comes to it until it is done."""
        begin, end = self._new_event(), self._new_event()
        begin.record()
        result = call()
        end.record()
        self._queued.append((stage, begin, end))
        return result

    def _settle(self) -> None:
        """Wait for the GPU, and count what was queued."""
        for stage, begin, end in self._queued:
            end.synchronize()
            self._add(stage, round(begin.elapsed_time(end) * 1e6), self.steps_back)
        self._queued = []

    def time_picture(self, draw: Callable[[], object]) -> int:
        """Time one call of the pipeline, in ns: a sample end to end, and what lies outside the networks as
        overhead.
        """
        self._settle()
        before_ns, event = self._network_ns(), None
        if self._on_gpu:  # which is idle now, and passes the event at once
            event = self._new_event()
            event.record()
        self._start = start = _Start(self._now_ns(), event, self.steps_back)
        draw()
        self._start = None
        self._settle()
        whole_ns = max(0, self._now_ns() - start.at_ns)
        networks_ns = self._network_ns() - before_ns
        if self._add(Stage.END_TO_END, whole_ns, start.steps_back):
            # Two clocks time a picture on a GPU, and they may differ by the little that is not the networks'.
            self._samples_ns.setdefault(Stage.OVERHEAD, []).append(max(0, whole_ns - networks_ns))
        return whole_ns

    def _add(self, stage: Stage, sample_ns: int, steps_back: int) -> bool:
        """Keep a sample, unless the clock has gone back more than `steps_back` times, or did not move."""
        if sample_ns <= 0 and steps_back == self.steps_back:
            self.steps_back += 1
        if steps_back != self.steps_back:
            return False
        self._samples_ns.setdefault(stage, []).append(sample_ns)
        return True

    def _now_ns(self) -> int:
        now_ns = self._read_ns()
        if self._last_ns is not None and now_ns < self._last_ns:
            self.steps_back += 1
        self._last_ns = now_ns
        return now_ns

    def take(self) -> dict[Stage, tuple[int, ...]]:
        """The samples so far, and start anew: what is taken and dropped is the warm-up."""
        self._settle()
        taken = {stage: tuple(self._samples_ns[stage]) for stage in Stage if stage in self._samples_ns}
        self._samples_ns = {}
        return taken

    def _network_ns(self) -> int:
        stages = self._samples_ns.keys() - {Stage.END_TO_END, Stage.OVERHEAD, Stage.FIRST_STEP}
        return sum(sum(self._samples_ns[stage]) for stage in stages)


class TimedSession(WrappedSession):
    """A session whose runs a clock times."""

    def __init__(self, session: Session, clock: Clock) -> None:
        super().__init__(session)
        self._clock = clock
        self._stage = _STAGES[session.spec.name]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        measure = self._clock.time_call if self.device.type == "cpu" else self._clock.time_queue
        return measure(self._stage, lambda: self.inner.run(inputs))
