"""What a model can be asked to draw, and the pipeline of diffusers that draws it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sdopt.model.family import Family


class Task(StrEnum):
    """What a request asks for; the value is its name in requests and manifests."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"

    @property
    def label(self) -> str:
        return {
            Task.TEXT_TO_IMAGE: "text to image", Task.IMAGE_TO_IMAGE: "image to image", Task.INPAINT: "inpainting",
        }[self]  # fmt: skip


_SD = {
    Task.TEXT_TO_IMAGE: "StableDiffusionPipeline",
    Task.IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionInpaintPipeline",
}
_XL_FROM_PICTURES = {
    Task.IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline",
    Task.INPAINT: "StableDiffusionXLInpaintPipeline",
}
PIPELINE_CLASSES: Mapping[Family, Mapping[Task, str]] = {
    Family.SD1: _SD,
    Family.SD2: _SD,
    Family.SDXL: {Task.TEXT_TO_IMAGE: "StableDiffusionXLPipeline", **_XL_FROM_PICTURES},
    Family.SDXL_REFINER: _XL_FROM_PICTURES,
}
"""Every task that a family knows, the one that it was made for first, and the name of its class in diffusers."""


def find_tasks(family: Family, unet_channels: int, latent_channels: int) -> tuple[Task, ...]:
    """What a UNet that takes so many channels can be asked for, the task that it was made for first.

    One that takes latents alone does all that its family knows: diffusers inpaints with it by blending. One that also
    takes a mask and the masked latents needs them. Empty for any other, which sdopt does not know.
    """
    if unet_channels == latent_channels:
        return tuple(PIPELINE_CLASSES[family])
    return (Task.INPAINT,) if unet_channels == 2 * latent_channels + 1 else ()
