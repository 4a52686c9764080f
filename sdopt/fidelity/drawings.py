"""Draw a scene with one candidate, and keep the pictures and the latents of every step.

`draw_isolated` does it in another process. What is kept is a `Drawing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdopt import progress
from sdopt.backends.protocol import Session
from sdopt.bundle.manifest import BundleManifest
from sdopt.fidelity.candidate import open_candidate
from sdopt.fidelity.scene import Scene
from sdopt.model.backend_settings import BackendSettings, TorchSettings
from sdopt.model.task import Task
from sdopt.processes.call import call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Image to image runs strength x steps of the schedule. Half of twice the steps is the number that was asked
# for.
_STRENGTH = 0.5


@dataclass(frozen=True)
class Drawing:
    """Float RGB `images` in [0, 1], (pictures, height, width, 3), and `latents`, (pictures, steps, channels, h, w).

    `file` is where it was read from.
    """

    images: NDArray[np.float32]
    latents: NDArray[np.float32]
    scheduler: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class DrawJob:
    """`settings` of None opens each component as the bundle says. `output` is the .safetensors file to keep it in.

    Where there is an `again`, torch draws a second time by its plainest attention kernel: the noise floor.
    """

    folder: Path
    manifest: BundleManifest
    settings: BackendSettings | None
    scene: Scene
    output: Path
    label: str
    again: Path | None = None


def draw_isolated(
    folder: Path,
    manifest: BundleManifest,
    settings: BackendSettings | None,
    scene: Scene,
    output: Path,
    *,
    label: str,
    timeout_s: float | None = None,
) -> Drawing:
    """Draw the scene in a process of its own; `label` is for progress."""
    call(draw, DrawJob(folder, manifest, settings, scene, output, label), timeout_s=timeout_s)
    return read_drawing(output)


def draw_twice_isolated(
    folder: Path,
    manifest: BundleManifest,
    settings: TorchSettings,
    scene: Scene,
    outputs: tuple[Path, Path],
    *,
    label: str,
    timeout_s: float | None = None,
) -> tuple[Drawing, Drawing]:
    """Draw with torch, and again by another attention kernel, in one process: its weights are read once."""
    call(draw, DrawJob(folder, manifest, settings, scene, outputs[0], label, outputs[1]), timeout_s=timeout_s)
    return read_drawing(outputs[0]), read_drawing(outputs[1])


def draw(job: DrawJob) -> None:
    """The child's side: open the candidate, draw every prompt, write the file."""
    sessions: list[Session] = []

    def keep(session: Session) -> Session:
        sessions.append(session)
        return session

    progress.update(f"opening {job.label}", 0.0)
    with open_candidate(job.folder, job.manifest, job.settings, keep, job.scene.loras) as pipeline:
        _draw_to(job.output, pipeline, job, job.label)
        if job.again is not None:
            from sdopt.backends.torch_eager import TorchSession

            for session in sessions:
                assert isinstance(session, TorchSession)
                session.use_attention("math")
            _draw_to(job.again, pipeline, job, f"{job.label} again (noise floor)")


def _draw_to(output: Path, pipeline: DiffusionPipeline, job: DrawJob, label: str) -> None:
    tell = partial(progress.update, f"drawing with {label}")
    write_drawing(draw_scene(pipeline, job.manifest, job.scene, tell), output)


def draw_scene(
    pipeline: DiffusionPipeline, manifest: BundleManifest, scene: Scene, tell: Callable[[float], None]
) -> Drawing:
    """Draw every prompt of the scene, as many at a time as the engines' batch holds. `tell` gets the share
    done.
    """
    return join_drawings(
        [draw_batch(pipeline, manifest, scene, start, tell) for start in batch_starts(manifest, scene)]
    )


def batch_starts(manifest: BundleManifest, scene: Scene) -> range:
    """Index of the first picture of each batch."""
    return range(0, len(scene.prompts), manifest.profile.batch.min)


def draw_batch(
    pipeline: DiffusionPipeline,
    manifest: BundleManifest,
    scene: Scene,
    start: int,
    tell: Callable[[float], None],
) -> Drawing:
    """Draw the batch of pictures that begins at `start`; the last may be smaller than the others."""
    from sdopt.pipeline.schedulers import label_of

    count = len(scene.prompts)
    indices = list(range(start, min(start + manifest.profile.batch.min, count)))
    steps: list[NDArray[np.float32]] = []
    keep = _keep_latents(steps, tell, start / count, len(indices) / scene.steps / count)
    images = pipeline(**build_call(pipeline, manifest, scene, indices), callback_on_step_end=keep).images
    return Drawing(np.asarray(images, dtype=np.float32), np.stack(steps, axis=1), label_of(pipeline.scheduler))


def join_drawings(parts: Sequence[Drawing]) -> Drawing:
    images, latents = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "latents"))
    return Drawing(images, latents, parts[0].scheduler)


def _keep_latents(
    steps: list[NDArray[np.float32]], tell: Callable[[float], None], done: float, each: float
) -> Callable[..., dict[str, Any]]:
    """A callback of diffusers that adds each step's latents to `steps`, and tells how far the scene is."""

    def keep(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        del pipeline, step, timestep
        steps.append(state["latents"].detach().float().cpu().numpy().copy())
        tell(done + each * len(steps))
        return state

    return keep


def build_call(
    pipeline: DiffusionPipeline, manifest: BundleManifest, scene: Scene, indices: list[int]
) -> dict[str, Any]:
    """Keyword arguments that make the bundle's pipeline draw these pictures of the scene, as float arrays."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    inputs = load_file(scene.inputs)
    call: dict[str, Any] = {
        "prompt": [scene.prompts[i] for i in indices],
        "num_inference_steps": scene.steps,
        "guidance_scale": scene.guidance_scale,
        "generator": [torch.Generator().manual_seed(scene.seed_of(i)) for i in indices],
        "output_type": "np",
    }
    if "image" in inputs:
        call["image"] = [Image.fromarray(inputs["image"].numpy())] * len(indices)
    if manifest.own_task is Task.INPAINT:
        # SDXL's default strength of 0.9999 would drop a step.
        call |= {"mask_image": [Image.fromarray(inputs["mask"].numpy())] * len(indices), "strength": 1.0}
    if manifest.own_task is Task.IMAGE_TO_IMAGE:
        # Its pipeline takes given latents as already noised; the seeded generators give every candidate one
        # noise.
        return call | {"strength": _STRENGTH, "num_inference_steps": round(scene.steps / _STRENGTH)}
    height_px, width_px = manifest.profile.height_px.opt, manifest.profile.width_px.opt
    latents = inputs["latents"][indices].to(pipeline.unet.dtype)
    return call | {"latents": latents, "height": height_px, "width": width_px}


def write_drawing(drawing: Drawing, path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "images": np.ascontiguousarray(drawing.images),
        "latents": np.ascontiguousarray(drawing.latents),
    }
    save_file(tensors, path, metadata={"scheduler": drawing.scheduler})


def read_drawing(path: Path) -> Drawing:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return Drawing(file.get_tensor("images"), file.get_tensor("latents"), file.metadata()["scheduler"], path)
