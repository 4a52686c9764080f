"""What every candidate is asked to draw: one file of inputs for all, so that the pictures differ by the
engines alone.

The file holds `latents`, (pictures, channels, latent height, latent width) fp32, and for a pipeline that
starts from a picture also `image`, (height, width, 3) uint8, and `mask`, (height, width) uint8 with 255 where
to paint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.fidelity.metrics import Picture
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraUse
from sdopt.model.task import Task
from sdopt.processes.call import How, call

DEFAULT_PROMPTS = ("a large red circle on a blue background", "a small yellow star on a purple background")


class Scene(BaseModel):
    """Prompts, one picture each; picture i has the seed `seed + i`. `inputs` is the file described above.

    `loras` are files with their digests, which act on every picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = Field(min_length=1)
    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    inputs: Path
    loras: tuple[LoraUse, ...] = ()

    def seed_of(self, index: int) -> int:
        return self.seed + index


@dataclass(frozen=True)
class SceneJob:
    """`scene` of the bundle in `folder`, whose manifest need not be there yet."""

    folder: Path
    manifest: BundleManifest
    scene: Scene


def write_scene(folder: Path, manifest: BundleManifest, scene: Scene, *, how: How = How.WARM) -> None:
    """Draw the inputs from the scene's seeds, at the bundle's usual size, and write them. A child does: torch draws."""
    call(write_scene_in_child, SceneJob(folder, manifest, scene), how=how)


def write_scene_in_child(job: SceneJob) -> None:
    """The latents are those that diffusers draws from a CPU generator with the same seed, so `sdopt generate --seed`
    starts from the same noise.
    """
    import torch
    from safetensors.torch import save_file

    manifest, scene = job.manifest, job.scene
    config = read_config(job.folder, ComponentName.VAE_DECODER)
    height_px, width_px = manifest.profile.height_px.opt, manifest.profile.width_px.opt
    factor = manifest.require_pixels_per_latent()
    shape = (1, int(config["latent_channels"]), height_px // factor, width_px // factor)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(scene.seed_of(i))) for i in range(len(scene.prompts))
    ]
    tensors = {"latents": torch.cat(noise)}
    if manifest.own_task is not Task.TEXT_TO_IMAGE:
        tensors["image"] = torch.from_numpy(paint_image(height_px, width_px, scene.seed))
        tensors["mask"] = torch.from_numpy(_paint_mask(height_px, width_px))
    save_file(tensors, scene.inputs)


def paint_image(height_px: int, width_px: int, seed: int) -> Picture:
    """A seeded picture with soft and hard edges: two colour gradients and a few discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height_px, 0:width_px] / max(height_px, width_px)
    corners = rng.uniform(40, 215, size=(3, 3))
    image = corners[0] + x[..., None] * (corners[1] - corners[0]) + y[..., None] * (corners[2] - corners[0])
    for _ in range(4):
        centre_y, centre_x, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25)
        image[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = rng.uniform(0, 255, size=3)
    painted: Picture = np.clip(image, 0, 255).astype(np.uint8)
    return painted


def _paint_mask(height_px: int, width_px: int) -> Picture:
    """Paint anew the middle quarter."""
    mask = np.zeros((height_px, width_px), dtype=np.uint8)
    mask[height_px // 4 : 3 * height_px // 4, width_px // 4 : 3 * width_px // 4] = 255
    return mask
