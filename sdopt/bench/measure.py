"""Measure one candidate in this process. It is the entry of a child: the parent decides who runs when.

Cold start, the other pictures of the scene (kept where `output` is given, for fidelity), then timed pictures.
All before the timed ones is warm-up: its samples are dropped.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import progress
from sdopt.artifacts.device_memory import DeviceMemoryPeak, sample_device_memory
from sdopt.artifacts.manifest import BundleManifest
from sdopt.backends.protocol import Session
from sdopt.bench.clock import Clock
from sdopt.fidelity.candidate import engines_use_gpu, open_candidate, parse_settings
from sdopt.fidelity.draw import batch_starts, build_call, draw_batch, join_drawings, write_drawing
from sdopt.fidelity.scene import Scene
from sdopt.isolation import JsonTable
from sdopt.model.recipe import BackendSettings, needs_gpu

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from sdopt.backends.gpu import GpuIdentity


def measure(arguments: JsonTable) -> JsonTable:
    """Run a candidate; the result is a `ProcessRecord` without position and host memory, and the scheduler's name.

    `launched_ns` is the parent's `time.monotonic_ns`, a clock that all processes of a machine share.
    """
    importlib.import_module("sdopt.pipeline.assemble")  # torch and diffusers, which are not the candidate's to load
    imported_ns = time.monotonic_ns()
    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    scene = Scene.model_validate(arguments["scene"])
    label = str(arguments["label"])
    clock = Clock()
    progress.update(f"{label}: opening", 0.0)
    folder, settings = Path(arguments["folder"]), parse_settings(arguments["settings"])
    gpu = _find_own_gpu(manifest, settings)
    sessions: list[Session] = []

    def keep(session: Session) -> Session:
        sessions.append(session)
        return clock.wrap(session)

    with _watch(gpu) as peak, open_candidate(folder, manifest, settings, keep) as pipeline:
        opened_ns = time.monotonic_ns()
        starts = batch_starts(manifest, scene)
        drawings = [
            draw_batch(
                pipeline,
                manifest,
                scene,
                starts[0],
                lambda share: progress.update(f"{label}: cold start", share),
            )
        ]
        drawn_ns = time.monotonic_ns()
        if arguments["output"]:
            for start in starts[1:]:
                drawings.append(
                    draw_batch(
                        pipeline,
                        manifest,
                        scene,
                        start,
                        lambda share: progress.update(f"{label}: drawing", share),
                    )
                )
            write_drawing(join_drawings(drawings), Path(arguments["output"]))
        clock.take()
        _time_pictures(pipeline, manifest, scene, clock, arguments)
        device_memory = read_device_memory(sessions)
    return {
        "device_memory": device_memory,
        "peak_device_bytes": peak.peak_bytes,
        "torch_peak_device_bytes": None if gpu is None else _torch_peak_bytes(),
        "import_ns": imported_ns - arguments["launched_ns"],
        "load_ns": opened_ns - imported_ns,
        "first_picture_ns": drawn_ns - opened_ns,
        "cold_start_ns": drawn_ns - arguments["launched_ns"],
        "samples_ns": clock.take(),
        "scheduler": drawings[0].scheduler,
    }


def _find_own_gpu(manifest: BundleManifest, settings: BackendSettings | None) -> GpuIdentity | None:
    """The GPU that the candidate computes on; a candidate of the CPU has none, and CUDA is not even started."""
    if not (engines_use_gpu(manifest) if settings is None else needs_gpu(settings)):
        return None
    from sdopt.backends.gpu import find_gpu

    return find_gpu()


def _watch(gpu: GpuIdentity | None) -> contextlib.AbstractContextManager[DeviceMemoryPeak]:
    return contextlib.nullcontext(DeviceMemoryPeak()) if gpu is None else sample_device_memory(gpu.uuid)


def read_device_memory(sessions: Sequence[Session]) -> dict[str, dict[str, Any]]:
    """What each open session holds of its GPU, by component, as a `DeviceMemoryRecord` takes it."""
    held = {session.spec.name: session.memory().device for session in sessions}
    return {name: asdict(device) for name, device in held.items() if device is not None}


def _torch_peak_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())


def _time_pictures(
    pipeline: DiffusionPipeline, manifest: BundleManifest, scene: Scene, clock: Clock, arguments: JsonTable
) -> None:
    """Draw the prompts in turn, full batches, until the budget is spent: `least_pictures` to `most_pictures`
    calls.
    """
    least, most = arguments["least_pictures"], arguments["most_pictures"]
    turn = itertools.cycle(range(len(scene.prompts)))
    spent_ns = 0
    for done in range(most):
        if done >= least and spent_ns > arguments["picture_budget_s"] * 1e9:
            break
        progress.update(f"{arguments['label']}: timing", done / most)
        call = build_call(pipeline, manifest, scene, list(itertools.islice(turn, manifest.profile.batch.min)))
        spent_ns += clock.time_picture(lambda call=call: pipeline(**call))  # type: ignore[misc]
