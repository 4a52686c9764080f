"""What to draw, as data, and the drawing of it. Knows neither files nor the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sdopt.errors import UsageError
from sdopt.model.family import Family
from sdopt.pipeline.schedulers import SchedulerName, make_scheduler, parse_scheduler

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

SEED_LIMIT = 2**63


def _to_scheduler(value: object) -> object:
    return parse_scheduler(value) if isinstance(value, str) else value


class GenerateRequest(BaseModel):
    """One picture. The same request on the same bundle and machine draws the same picture, bit for bit.

    `scheduler` None is the checkpoint's own; `width_px` and `height_px` None are the bundle's size. A
    `negative_prompt` of None is not quite the same as an empty one: SDXL then guides away from zeros.
    `clip_skip` counts as diffusers does: 1 takes the last but one layer (A1111 calls that 2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(max_length=20_000)
    negative_prompt: str | None = Field(default=None, max_length=20_000)
    steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=7.5, ge=0.0, le=100.0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    scheduler: Annotated[SchedulerName, BeforeValidator(_to_scheduler)] | None = None
    width_px: int | None = Field(default=None, ge=1, le=1 << 16)
    height_px: int | None = Field(default=None, ge=1, le=1 << 16)
    clip_skip: int | None = Field(default=None, ge=1, le=64)


def parse_request(values: dict[str, Any]) -> GenerateRequest:
    """Validate values into a request. Raises `UsageError` that names the first bad one."""
    try:
        return GenerateRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "the request"
        raise UsageError(f"{name}: {first['msg']} (got {str(first['input'])[:80]!r})") from error


def generate(pipe: DiffusionPipeline, request: GenerateRequest) -> Image.Image:
    """Draw one picture. See `generate_all`."""
    return next(generate_all(pipe, [request]))


def generate_all(
    pipe: DiffusionPipeline,
    requests: Sequence[GenerateRequest],
    *,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[Image.Image]:
    """Draw a picture for each request, in order; neighbours with the same settings share the engine's batch.

    Each picture has its own generator, so its noise depends on its seed alone. `on_step` is told the share of
    all the work that is done. `pipe` is of `sdopt.load`; where no request names a scheduler, any
    text-to-image pipeline. Raises `UsageError` for a request that the pipeline cannot draw, `ShapeError` for
    a size not built for.
    """
    own, done = pipe.scheduler, 0
    for group in _group(pipe, requests):

        def tell(share: float, before: int = done, pictures: int = len(group)) -> None:
            if on_step is not None:
                on_step((before + share * pictures) / len(requests))

        try:
            if group[0].scheduler is not None:
                pipe.scheduler = _scheduler_for(pipe, group[0].scheduler)
            images = _draw(pipe, group, tell)
        finally:
            pipe.scheduler = own
        done += len(group)
        yield from images


def _draw(
    pipe: DiffusionPipeline, group: Sequence[GenerateRequest], tell: Callable[[float], None]
) -> list[Image.Image]:
    import torch

    def on_step_end(
        running: Any, step: int, timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        del timestep
        tell((step + 1) / running.num_timesteps)
        return tensors

    _refuse_without_picture(pipe)
    first = group[0]
    _check_size(pipe, first)
    arguments: dict[str, Any] = {
        "prompt": [request.prompt for request in group],
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in group],
        "width": first.width_px,
        "height": first.height_px,
        "clip_skip": first.clip_skip,
        "callback_on_step_end": on_step_end,
    }
    if first.negative_prompt is not None:
        arguments["negative_prompt"] = [request.negative_prompt for request in group]
    try:
        images: list[Image.Image] = pipe(**arguments).images
    except (ValueError, IndexError) as error:
        # How diffusers says that it cannot take an argument, such as more LCM steps than the model was
        # distilled for.
        raise UsageError(f"the pipeline cannot draw this: {error}") from error
    return images


def _group(pipe: DiffusionPipeline, requests: Sequence[GenerateRequest]) -> Iterator[Sequence[GenerateRequest]]:
    from sdopt.pipeline.prompt import count_chunks

    def settings(request: GenerateRequest) -> object:
        shared = request.model_copy(update={"prompt": "", "negative_prompt": None, "seed": 0})
        # A prompt that is filled up to the length of its neighbour's draws another picture than alone.
        chunks = count_chunks(pipe, [request.prompt, request.negative_prompt or ""])
        return shared, request.negative_prompt is None, chunks

    batch = _batch_of(pipe)
    for _, neighbours in groupby(requests, settings):
        group = list(neighbours)
        yield from (group[start : start + batch] for start in range(0, len(group), batch))


def _check_size(pipe: DiffusionPipeline, request: GenerateRequest) -> None:
    """Before any work, and before diffusers, which knows no profiles."""
    bundle = getattr(pipe.unet, "bundle", None)
    if bundle is None or request.width_px is request.height_px is None:
        return
    usual = bundle.manifest.profile
    width_px, height_px = request.width_px or usual.width_px.opt, request.height_px or usual.height_px.opt
    pipe.unet.check_size(width_px, height_px)


def _batch_of(pipe: DiffusionPipeline) -> int:
    bundle = getattr(pipe.unet, "bundle", None)
    return 1 if bundle is None else int(bundle.manifest.profile.batch.max)


def _scheduler_for(pipe: DiffusionPipeline, name: SchedulerName) -> Any:
    from sdopt.pipeline.opened import opened_bundle

    bundle = opened_bundle(pipe)
    manifest = bundle.manifest
    return make_scheduler(name, bundle.scheduler_config, family=manifest.family, prediction=manifest.prediction)


def _refuse_without_picture(pipe: DiffusionPipeline) -> None:
    bundle = getattr(pipe.unet, "bundle", None)
    if bundle is None or not (bundle.manifest.inpainting or bundle.manifest.family is Family.SDXL_REFINER):
        return
    kind = "an inpainting model" if bundle.manifest.inpainting else "the SDXL refiner"
    raise UsageError(
        f"{bundle.manifest.name} is {kind}, which starts from a picture and not from a prompt alone",
        hint="from Python: sdopt.load(folder)(prompt=…, image=…)",
    )
