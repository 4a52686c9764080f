"""Draws what quantisation is calibrated and judged on: the inputs of every network on the model's own way to pictures.

A trajectory is one prompt, drawn from one seed with one guidance scale by torch in fp32. DDIM's steps lie a stride
apart (250 timesteps where there are four). Each trajectory has them shifted by another part of that stride, by the
golden ratio's multiples: few trajectories already see every range of timesteps, and a further one falls into the widest
gap. All steps of a trajectory move alike, so DDIM still denoises from each to the next.

Held-out trajectories end in a picture, and have the calls of both of the VAE's networks. Calibration ones end in
latents: no scale is made of what a VAE is given, and at 512x512 its networks take as long as two steps.

Every finished trajectory is an entry of the store: a run that was interrupted goes on with the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.convert.blocks.recording import Recorder
from sdopt.disk.digest import digest_of
from sdopt.disk.files import hash_file
from sdopt.disk.store import Store
from sdopt.errors import ArtifactError, RecipeError
from sdopt.fidelity.candidate import open_candidate
from sdopt.fidelity.drawings import build_call
from sdopt.fidelity.scene import Scene, SceneJob, write_scene_in_child
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.quantization import CalibrationSettings
from sdopt.model.task import Task
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

STAGE = "trajectory"
TRAJECTORY_NAME = "trajectory.safetensors"
# Raise it when what is recorded changes: nothing of before is used again.
_FORMAT = 1
# Held-out trajectories count from here, above every number of a calibration trajectory: their seeds are others, and
# stay the same whatever the number of calibration trajectories is.
_HELD_OUT_FROM = 256
_GOLDEN_RATIO = 0.618034


@dataclass(frozen=True)
class Trajectories:
    """Recorded files, read by `recording.read_calls`. `digest` is of everything that decided what is in them."""

    calibration: tuple[Path, ...]
    held_out: tuple[Path, ...]
    digest: str


@dataclass(frozen=True)
class Trajectory:
    """What is to be drawn. `shift` is the part of a stride, 0 to 1, that its timesteps are moved by.

    `decode` is whether it ends in a picture.
    """

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    shift: float
    decode: bool


@dataclass(frozen=True)
class Job:
    """What the child needs, as it crosses to it in JSON; the trajectories have the keys that the store is to know."""

    folder: Path
    manifest: BundleManifest
    cache: Path
    trajectories: dict[str, Trajectory]


_JOB = TypeAdapter(Job)


def record_trajectories(
    folder: Path, draft: BundleManifest, store: Store, settings: CalibrationSettings, prompts: Sequence[str],
    cache: Path,
) -> Trajectories:  # fmt: skip
    """Draw, in a child process, what the store of `cache` does not have yet of the trajectories of a bundle's model.

    `folder` holds the bundle that is being built; its weights must be those of the checkpoint, not quantised ones.
    Raises `RecipeError` where there are no two different prompts, and `CalibrationError` where torch draws NaN.
    """
    calibration, held_out = choose_trajectories(settings, prompts)
    model = _identify_model(folder, draft)
    keys = {each: digest_of([model, dataclasses.asdict(each)]) for each in (*calibration, *held_out)}
    missing = {key: each for each, key in keys.items() if store.find(STAGE, key) is None}
    if missing:
        job = _JOB.dump_python(Job(folder, draft, cache, missing), mode="json")
        call(record_in_child, job)
    return Trajectories(
        tuple(_require(store, keys[each]) for each in calibration),
        tuple(_require(store, keys[each]) for each in held_out),
        digest_of([[keys[each] for each in part] for part in (calibration, held_out)]),
    )


def choose_trajectories(
    settings: CalibrationSettings, prompts: Sequence[str]
) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    """(calibration, held-out). The last prompts are held out; too few are drawn again from other seeds."""
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise RecipeError(
            "calibration needs two different prompts or more: one is held out to measure errors on",
            hint="add lines to the file of prompts",
        )
    split = max(1, len(different) - settings.held_out)
    return (
        _plan(settings, different[:split], range(settings.trajectories)),
        _plan(settings, different[split:], range(_HELD_OUT_FROM, _HELD_OUT_FROM + settings.held_out)),
    )


def _plan(settings: CalibrationSettings, prompts: Sequence[str], numbers: range) -> tuple[Trajectory, ...]:
    scales = settings.guidance_scales
    return tuple(
        Trajectory(
            prompts[place % len(prompts)], settings.seed + number, settings.steps, scales[place % len(scales)],
            round(number * _GOLDEN_RATIO % 1, 6), number >= _HELD_OUT_FROM,
        )
        for place, number in enumerate(numbers)
    )  # fmt: skip


def _identify_model(folder: Path, draft: BundleManifest) -> dict[str, Any]:
    """Everything that the tensors of a trajectory depend on, but for the trajectory itself."""
    profile = draft.profile
    texts = sorted([*folder.glob("scheduler/*"), *folder.glob("tokenizer*/*")])
    return {
        "format": _FORMAT,
        "weights": draft.source.digest,
        "architectures": {name: record.architecture for name, record in draft.components.items()},
        "pipeline": [draft.family, draft.prediction, draft.own_task is Task.INPAINT],
        "sizes": [profile.height_px.opt, profile.width_px.opt, profile.batch.min, profile.batch.max],
        "texts": [[path.relative_to(folder).as_posix(), hash_file(path)] for path in texts],
        "libraries": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _require(store: Store, key: str) -> Path:
    entry = store.find(STAGE, key)
    if entry is None:
        raise ArtifactError("a trajectory vanished from the store while it was used", hint="run the same command again")
    return entry / TRAJECTORY_NAME


def record_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: open the model in torch, and put each trajectory into the store as it is drawn."""
    from safetensors.torch import save

    job = _JOB.validate_python(arguments)
    store, recorder = Store(job.cache), Recorder()
    progress.update("opening the model in torch", 0.0)
    with open_candidate(job.folder, job.manifest, TorchSettings(), recorder.wrap) as pipeline:
        for done, (key, trajectory) in enumerate(job.trajectories.items()):
            _begin(recorder, trajectory, done, len(job.trajectories))
            tensors = _draw(pipeline, job, trajectory, recorder)
            store.put(STAGE, key, {TRAJECTORY_NAME: save(tensors)})
    return {}


def _begin(recorder: Recorder, trajectory: Trajectory, done: int, count: int) -> None:
    def tell(name: ComponentName, calls: int) -> None:
        if name is ComponentName.UNET:
            progress.update("recording trajectories", (done + calls / (trajectory.steps + 1)) / count)

    recorder.begin(trajectory.prompt, tell)


def _draw(pipeline: DiffusionPipeline, job: Job, trajectory: Trajectory, recorder: Recorder) -> dict[str, Tensor]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(
            prompts=(trajectory.prompt,), seed=trajectory.seed, steps=trajectory.steps,
            guidance_scale=trajectory.guidance_scale, inputs=Path(folder) / "inputs.safetensors",
        )  # fmt: skip
        write_scene_in_child(SceneJob(job.folder, job.manifest, scene))
        call = build_call(pipeline, job.manifest, scene, [0])
    if not trajectory.decode:
        call["output_type"] = "latent"
    with _shifted(pipeline.scheduler, trajectory.shift):
        images = pipeline(**call).images
    if trajectory.decode and pipeline.vae.encoder is not None and not recorder.count(ComponentName.VAE_ENCODER):
        # Text to image does not call it: it is given the picture that was drawn.
        pipeline.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    return recorder.take()


@contextlib.contextmanager
def _shifted(scheduler: Any, share: float) -> Iterator[None]:
    """While open, the scheduler's timesteps are moved by this part of their stride."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def shifted(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = shift_timesteps(scheduler.timesteps, scheduler.config.num_train_timesteps, share)

    scheduler.set_timesteps = shifted
    try:
        yield
    finally:
        del scheduler.set_timesteps


def shift_timesteps(timesteps: Tensor, count: int, share: float) -> Tensor:
    """Timesteps [n] below `count`, moved by `share` of the stride count / n: up, or down where there is no room."""
    shift = int(share * (count // len(timesteps)))
    fits = int(timesteps.max()) + shift < count
    return (timesteps + (shift if fits else -shift)).clamp(min=0)
