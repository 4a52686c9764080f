"""The drawing of requests. Knows neither the files that pictures go to nor the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdopt.model.request import DrawRequest, ImageToImage, Inpaint, TextToImage
from sdopt.tasks.group import group_requests
from sdopt.tasks.loras import LoraFinder, active_loras
from sdopt.tasks.prepare import PreparedRequest, prepare
from sdopt.tasks.words import active_words

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image


def draw_picture(pipe: DiffusionPipeline, request: DrawRequest, *, loras: LoraFinder | None = None) -> Image.Image:
    """Draw one picture. See `draw_pictures`."""
    return next(draw_pictures(pipe, [request], loras=loras))


def draw_pictures(
    pipe: DiffusionPipeline,
    requests: Sequence[DrawRequest],
    *,
    names: Mapping[str, str] | None = None,
    on_step: Callable[[float], None] | None = None,
    loras: LoraFinder | None = None,
    on_prepared: Callable[[Sequence[PreparedRequest]], None] = lambda prepared: None,
    expected_loras: Mapping[str, str] = MappingProxyType({}),
    expected_words: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Image.Image]:
    """Draw a picture for each request, in order; neighbours with the same settings share the engine's batch.

    Each picture has its own generator, so its noise depends on its seed alone. `on_step` is told the share of all the
    work that is done; `names` are what the user calls the fields of a request. `loras` finds the LoRAs that requests
    name, whose digests are those of `expected_loras`, and those of textual inversions of `expected_words`;
    `on_prepared` is told what was found, before the first picture.
    `pipe` is of `sdopt.load`; where no request names a scheduler, any text-to-image pipeline. Several threads may draw
    with one pipeline: each group of pictures waits for its turn.

    Raises, before the first picture, `UsageError` for a request that the pipeline cannot draw and `ShapeError` for a
    size not built for; and `DrawingError` where a picture would have NaN or infinity.
    """
    from sdopt.pipeline.guarded_call import drawing_turn

    with drawing_turn(pipe):
        prepared = prepare(pipe, requests, names, loras, expected_loras, expected_words)
        groups = list(group_requests(pipe, prepared))
    on_prepared(prepared)
    done = 0
    for group in groups:

        def tell(share: float, before: int = done, pictures: int = len(group)) -> None:
            if on_step is not None:
                on_step((before + share * pictures) / len(requests))

        with drawing_turn(pipe):
            images = _draw(pipe, group, tell)
        done += len(group)
        yield from images


def _draw(
    pipe: DiffusionPipeline, group: Sequence[PreparedRequest], tell: Callable[[float], None]
) -> list[Image.Image]:
    from sdopt.pipeline.finite import require_finite_output
    from sdopt.pipeline.guarded_call import guard_call

    def on_step_end(
        running: Any, step: int, timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        del timestep
        tell((step + 1) / running.num_timesteps)
        return tensors

    relative = _pipeline_for(pipe, group[0].request)
    own = relative.scheduler
    relative.scheduler = group[0].scheduler
    arguments = {**_arguments(group), "callback_on_step_end": on_step_end, "output_type": "np"}
    try:
        with active_loras(relative, group[0].loras), active_words(relative, group[0].words):
            drawn = guard_call(relative, functools.partial(relative, **arguments), arguments)
    finally:
        relative.scheduler = own
    require_finite_output(drawn)
    images: list[Image.Image] = relative.numpy_to_pil(drawn.images)
    return images


def _arguments(group: Sequence[PreparedRequest]) -> dict[str, Any]:
    import torch

    from sdopt.pipeline.schedulers import eta_of

    first = group[0].request
    arguments: dict[str, Any] = {
        "prompt": [each.prompt for each in group],
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance_scale,
        "eta": eta_of(group[0].scheduler),
        "generator": [torch.Generator("cpu").manual_seed(each.request.seed) for each in group],
        "clip_skip": first.clip_skip,
    }
    if first.negative_prompt is not None:
        arguments["negative_prompt"] = [each.negative_prompt for each in group]
    if isinstance(first, TextToImage):
        return arguments | {"width": first.width_px, "height": first.height_px}
    arguments |= {"image": [each.image for each in group], "strength": first.strength}
    if isinstance(first, Inpaint) and group[0].image is not None:
        width_px, height_px = group[0].image.size
        arguments |= {"mask_image": [each.mask for each in group], "width": width_px, "height": height_px}
    return arguments


def _pipeline_for(pipe: DiffusionPipeline, request: DrawRequest) -> Any:
    """The pipeline itself where its class does this task, or a relative over the same engines."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    from sdopt.pipeline.prompt_encoding import reading_prompts, reads_prompts

    kind = type(pipe).__name__
    if isinstance(request, ImageToImage) and "Img2Img" not in kind:
        relative = AutoPipelineForImage2Image.from_pipe(pipe)
    elif isinstance(request, Inpaint) and "Inpaint" not in kind:
        relative = AutoPipelineForInpainting.from_pipe(pipe)
    else:
        return pipe
    if reads_prompts(pipe):
        # Diffusers made it of its own class.
        own: Any = type(relative)
        relative.__class__ = reading_prompts(own)
    relative.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return relative
