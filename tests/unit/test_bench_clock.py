"""The clock: which stage a run counts for, and what is left as overhead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdopt.bench.case.report import Stage
from sdopt.bench.measure.clock import Clock
from sdopt.model.component import ComponentName


class FakeTime:
    """A clock in ns that only moves when told."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class SlowSession:
    """A session that takes `cost_ns` a run."""

    def __init__(self, name: ComponentName, time: FakeTime, cost_ns: int) -> None:
        self.spec = SimpleNamespace(name=name)
        self.extents: dict[str, Any] = {"batch": 1}
        self.device = torch.device("cpu")
        self.closed = False
        self._time, self._cost_ns = time, cost_ns

    def run(self, inputs: Any) -> Any:
        self._time.now += self._cost_ns
        return {"echo": inputs}

    def memory(self) -> str:
        return "memory"

    def close(self) -> None:
        self.closed = True


def test_stages_and_overhead_add_up_to_the_whole() -> None:
    time = FakeTime()
    clock = Clock(time)
    costs = {
        ComponentName.TEXT_ENCODER: 5,
        ComponentName.TEXT_ENCODER_2: 6,
        ComponentName.UNET: 40,
        ComponentName.VAE_DECODER: 9,
    }
    sessions: dict[ComponentName, Any] = {
        name: clock.wrap(SlowSession(name, time, cost))
        for name, cost in costs.items()  # type: ignore[arg-type]
    }

    def draw() -> None:
        sessions[ComponentName.TEXT_ENCODER].run({})
        sessions[ComponentName.TEXT_ENCODER_2].run({})
        for _ in range(3):
            sessions[ComponentName.UNET].run({})
            time.now += 2
            clock.end_step()
        sessions[ComponentName.VAE_DECODER].run({})

    for _ in range(2):
        clock.time_picture(draw)
    samples = clock.take()
    assert samples == {
        Stage.TEXT_ENCODER: (5, 6, 5, 6),
        Stage.UNET_STEP: (40,) * 6,
        Stage.VAE_DECODER: (9, 9),
        Stage.OVERHEAD: (6, 6),
        Stage.END_TO_END: (146, 146),
        Stage.FIRST_STEP: (53, 53),
    }
    beside = (Stage.END_TO_END, Stage.OVERHEAD, Stage.FIRST_STEP)
    networks = sum(sum(samples[s]) for s in samples if s not in beside)
    assert networks + sum(samples[Stage.OVERHEAD]) == sum(samples[Stage.END_TO_END])


def test_taking_starts_anew() -> None:
    time = FakeTime()
    clock = Clock(time)
    session = clock.wrap(SlowSession(ComponentName.UNET, time, 7))  # type: ignore[arg-type]
    clock.time_picture(lambda: session.run({}))
    clock.take()
    assert clock.take() == {}
    clock.time_picture(lambda: session.run({}))
    assert clock.take()[Stage.OVERHEAD] == (0,)


def test_a_timed_session_is_the_session_in_all_else() -> None:
    time = FakeTime()
    inner = SlowSession(ComponentName.VAE_ENCODER, time, 1)
    with Clock(time).wrap(inner) as session:  # type: ignore[arg-type]
        assert session.spec is inner.spec
        assert session.extents is inner.extents
        assert session.memory() == "memory"
        assert session.run({"a": 1}) == {"echo": {"a": 1}}  # type: ignore[dict-item]
    assert inner.closed


class FakeEvent:
    """An event of a GPU that does what is queued at once, at `time`."""

    def __init__(self, time: FakeTime) -> None:
        self._time, self.at_ns, self.waited = time, -1, False

    def record(self) -> None:
        self.at_ns = self._time.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.waited
        return (end.at_ns - self.at_ns) / 1e6


def test_what_a_gpu_does_is_timed_by_its_events_and_waited_for_at_the_end() -> None:
    time = FakeTime()
    events: list[FakeEvent] = []

    def new_event() -> Any:
        events.append(FakeEvent(time))
        return events[-1]

    clock = Clock(time, new_event)
    inner = SlowSession(ComponentName.UNET, time, 5_000)
    inner.device = torch.device("cuda", 0)
    session = clock.wrap(inner)  # type: ignore[arg-type]

    def draw() -> None:
        for _ in range(2):
            session.run({})
            assert not any(event.waited for event in events)
            time.now += 100
            clock.end_step()

    clock.time_picture(draw)
    assert clock.take() == {
        Stage.UNET_STEP: (5_000, 5_000), Stage.OVERHEAD: (200,), Stage.END_TO_END: (10_200,),
        Stage.FIRST_STEP: (5_100,),
    }  # fmt: skip
    assert clock.take() == {}


def test_a_run_that_fails_leaves_no_sample() -> None:
    clock = Clock(FakeTime())

    def fail() -> Any:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        clock.time_call(Stage.UNET_STEP, fail)
    assert clock.take() == {}


def test_a_clock_that_steps_back_leaves_no_sample_and_is_counted() -> None:
    time = FakeTime()
    clock = Clock(time)
    session = clock.wrap(SlowSession(ComponentName.UNET, time, 40))  # type: ignore[arg-type]

    def draw(jump_ns: int) -> None:
        session.run({})
        clock.end_step()
        time.now += jump_ns
        session.run({})

    clock.time_picture(lambda: draw(10))
    clock.time_picture(lambda: draw(-1_000))  # between two runs: they are sound, and the picture is not
    clock.time_picture(lambda: draw(10))
    assert clock.steps_back == 1
    assert clock.take() == {
        Stage.UNET_STEP: (40,) * 6, Stage.OVERHEAD: (10, 10), Stage.END_TO_END: (90, 90), Stage.FIRST_STEP: (40,) * 3,
    }  # fmt: skip


def test_a_step_back_between_two_runs_leaves_both() -> None:
    readings = iter([0, 100, 90, 200, 200, 300])
    clock = Clock(lambda: next(readings))
    for _ in range(3):
        clock.time_call(Stage.UNET_STEP, dict)
    assert clock.take() == {Stage.UNET_STEP: (100, 110, 100)}
    assert clock.steps_back == 1


def test_a_clock_that_stands_still_leaves_no_sample() -> None:
    clock = Clock(FakeTime())
    clock.time_call(Stage.UNET_STEP, dict)
    assert clock.take() == {}
    assert clock.steps_back == 1
