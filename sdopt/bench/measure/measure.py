"""Measure one candidate in this process. It is the entry of a child: the parent decides who runs when.

Cold start, the other pictures of the scene (kept where `output` is given, for fidelity), more pictures until their
times settle, then timed ones, and at last a few with fewer steps. All before the timed ones is warm-up: its samples are
not counted.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import progress
from sdopt.backends.protocol import Session
from sdopt.bench.case.report import Stage
from sdopt.bench.measure.clock import Clock
from sdopt.bench.measure.steady import Effort, Steady, has_settled, time_calls, warm_up
from sdopt.bundle.manifest import BundleManifest
from sdopt.fidelity.candidate import engines_use_gpu, open_candidate, parse_settings
from sdopt.fidelity.drawings import Drawing, batch_starts, build_call, draw_batch, join_drawings, write_drawing
from sdopt.fidelity.scene import Scene
from sdopt.machine.device_memory import DeviceMemoryPeak, sample_device_memory
from sdopt.model.backend_settings import BackendSettings, needs_gpu
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from sdopt.backends.cuda import GpuIdentity


@dataclass
class Painter:
    """Draws the prompts of a scene in turn, full batches, and times each call."""

    pipeline: DiffusionPipeline
    manifest: BundleManifest
    scene: Scene
    clock: Clock
    turn: itertools.cycle[int] = field(init=False)

    def __post_init__(self) -> None:
        self.turn = itertools.cycle(range(len(self.scene.prompts)))

    def draw(self, steps: int | None = None) -> int:
        """One call, of the scene's number of steps or another; returns its time in ns."""
        scene = self.scene if steps is None else self.scene.model_copy(update={"steps": steps})
        indices = list(itertools.islice(self.turn, self.manifest.profile.batch.min))
        call = build_call(self.pipeline, self.manifest, scene, indices)

        def end_step(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            del pipeline, step, timestep
            self.clock.end_step()
            return state

        return self.clock.time_picture(lambda: self.pipeline(**call, callback_on_step_end=end_step))


def measure(arguments: JsonTable) -> JsonTable:
    """Run a candidate; the result is a `ProcessRecord` without position and host memory, and the scheduler's name.

    `launched_ns` is the parent's `time.monotonic_ns`, a clock that all processes of a machine share. `effort` are
    the fields of `Effort`.
    """
    importlib.import_module("sdopt.pipeline.assemble")  # torch and diffusers, which are not the candidate's to load
    imported = Milestone.reach()
    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    scene = Scene.model_validate(arguments["scene"])
    label, effort = str(arguments["label"]), Effort(**arguments["effort"])
    clock = Clock()
    progress.update(f"{label}: opening", 0.0)
    folder, settings = Path(arguments["folder"]), parse_settings(arguments["settings"])
    gpu = find_own_gpu(manifest, settings)
    sessions: list[Session] = []

    def keep(session: Session) -> Session:
        sessions.append(session)
        return clock.wrap(session)

    with watch_memory(gpu) as peak, open_candidate(folder, manifest, settings, keep, scene.loras) as pipeline:
        opened = Milestone.reach()
        painter = Painter(pipeline, manifest, scene, clock)
        first, drawn_ns, done_ns = _draw_scene(painter, label, arguments["output"])
        steady = _measure_steady(painter, effort, done_ns, None if gpu is None else gpu.uuid, label)
        # Once for each candidate whatever it takes: without it there is no line through the steps.
        steady["sweep_ns"] = _sweep(painter, steady["samples_ns"], effort, always=bool(arguments["output"]))
        steady["conditions"]["clock_steps"] = clock.steps_back
        device_memory = read_device_memory(sessions)
    return steady | {
        "device_memory": device_memory,
        "peak_device_bytes": peak.peak_bytes,
        "torch_peak_device_bytes": None if gpu is None else torch_peak_bytes(),
        "scheduler": first.scheduler,
    } | describe_start(arguments["launched_ns"], imported, opened, drawn_ns)  # fmt: skip


def _draw_scene(painter: Painter, label: str, output: str) -> tuple[Drawing, int, list[int]]:
    """Draw the first batch, and where there is an `output` to write them to, the others.

    Returns the first, when it was there (`time.monotonic_ns`), and the times of the others in ns.
    """
    starts = batch_starts(painter.manifest, painter.scene)

    def draw(start: int, what: str) -> Drawing:
        def tell(share: float) -> None:
            progress.update(f"{label}: {what}", share)

        return draw_batch(painter.pipeline, painter.manifest, painter.scene, start, tell)

    drawings = [draw(starts[0], "cold start")]
    drawn_ns = time.monotonic_ns()
    done_ns = []
    if output:
        for start in starts[1:]:
            begun_ns = time.perf_counter_ns()
            drawings.append(draw(start, "drawing"))
            done_ns.append(time.perf_counter_ns() - begun_ns)
        write_drawing(join_drawings(drawings), Path(output))
    return drawings[0], drawn_ns, done_ns


def _measure_steady(
    painter: Painter, effort: Effort, done_ns: Sequence[int], gpu_uuid: str | None, label: str
) -> JsonTable:
    """Warm up and time. A call that leaves the budget of the warm-up is as good as one: then its steps say whether it
    has settled.
    """
    steps_ns = painter.clock.take().get(Stage.UNET_STEP, ())
    expected_ns = painter.scene.steps * statistics.median(steps_ns) if steps_ns else effort.budget_ns
    progress.update(f"{label}: warming up", 0.0)
    warm_up_ns = warm_up(painter.draw, done_ns, expected_ns, effort)
    steps_ns += painter.clock.take().get(Stage.UNET_STEP, ())
    enough = len(warm_up_ns) >= 2 * effort.settle_window
    steady = time_calls(painter.draw, effort, gpu_uuid, lambda share: progress.update(f"{label}: timing", share))
    return record_steady(steady, painter.manifest.profile.batch.min) | {
        "samples_ns": painter.clock.take(),
        "warm_up_ns": list(warm_up_ns),
        "settled": has_settled(warm_up_ns if enough else steps_ns, effort),
    }


def _sweep(
    painter: Painter, samples_ns: dict[Stage, tuple[int, ...]], effort: Effort, *, always: bool
) -> dict[int, tuple[int, ...]]:
    """End-to-end samples by number of steps: the timed ones, and a call with a quarter and with half of the steps."""
    usual, whole_ns = painter.scene.steps, samples_ns.get(Stage.END_TO_END, ())
    counts = sorted({max(1, usual // 4), max(1, usual // 2)} - {usual})
    expected_ns = statistics.median(whole_ns or [0]) * sum(counts) / usual
    sweep_ns = {usual: whole_ns} if whole_ns else {}
    if always or expected_ns <= effort.budget_ns:
        for steps in counts:
            painter.draw(steps)
            if samples := painter.clock.take().get(Stage.END_TO_END, ()):
                sweep_ns[steps] = samples
    return sweep_ns


def record_steady(steady: Steady, pictures: int) -> JsonTable:
    """What a process record takes of it; `pictures` are those of a call."""
    return {
        "energy_j": None if steady.energy_j is None else steady.energy_j / pictures,
        "energy_source": steady.energy_source,
        "conditions": steady.conditions.model_dump(mode="json"),
    }


def find_own_gpu(manifest: BundleManifest, settings: BackendSettings | None) -> GpuIdentity | None:
    """The GPU that the candidate computes on; a candidate of the CPU has none, and CUDA is not even started."""
    if not (engines_use_gpu(manifest) if settings is None else needs_gpu(settings)):
        return None
    from sdopt.backends.cuda import find_gpu

    return find_gpu()


def watch_memory(gpu: GpuIdentity | None) -> contextlib.AbstractContextManager[DeviceMemoryPeak]:
    return contextlib.nullcontext(DeviceMemoryPeak()) if gpu is None else sample_device_memory(gpu.uuid)


def read_device_memory(sessions: Sequence[Session]) -> dict[str, dict[str, Any]]:
    """What each open session holds of its GPU, by component, as a `DeviceMemoryRecord` takes it."""
    held = {session.spec.name: session.memory().device for session in sessions}
    return {name: asdict(device) for name, device in held.items() if device is not None}


@dataclass(frozen=True)
class Milestone:
    """When a step of the cold start was done (`time.monotonic_ns`), and the resident memory of this process then."""

    at_ns: int
    rss_bytes: int

    @classmethod
    def reach(cls) -> Milestone:
        import psutil

        return cls(time.monotonic_ns(), int(psutil.Process().memory_info().rss))


def describe_start(launched_ns: int, imported: Milestone, opened: Milestone, drawn_ns: int) -> JsonTable:
    """The cold start as a `ProcessRecord` takes it."""
    return {
        "import_ns": imported.at_ns - launched_ns,
        "load_ns": opened.at_ns - imported.at_ns,
        "first_picture_ns": drawn_ns - opened.at_ns,
        "cold_start_ns": drawn_ns - launched_ns,
        "rss_imported_bytes": imported.rss_bytes,
        "rss_loaded_bytes": opened.rss_bytes,
    }


def torch_peak_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())
