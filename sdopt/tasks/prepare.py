"""A request against the pipeline that is to draw it: whatever can be refused is refused here, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdopt.errors import UsageError
from sdopt.model.lora import LoraUse, WordUse
from sdopt.model.request import DrawRequest, Inpaint, TextToImage
from sdopt.model.task import Task
from sdopt.tasks.loras import LoraFinder, list_loras, load_loras
from sdopt.tasks.words import list_names, load_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image

    from sdopt.pipeline.word_stack import LoadedWord


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose prompts are as its pipeline takes them, whose scheduler is made, and whose pictures are open."""

    request: DrawRequest
    prompt: str
    negative_prompt: str | None
    scheduler: SchedulerMixin
    image: Image.Image | None = None
    mask: Image.Image | None = None
    loras: tuple[LoraUse, ...] = ()
    """What is loaded into the pipeline for it."""
    embeddings: tuple[WordUse, ...] = ()
    words: tuple[LoadedWord, ...] = field(default=(), compare=False)
    """What acts only while it is drawn."""


def check_prompts(request: DrawRequest, words: Sequence[str] = ()) -> None:
    """Raise `UsageError` for what a request's prompts have that is not drawn; `words` are loaded already."""
    from sdopt.pipeline.prompt_reading import read_prompt

    names = (*words, *list_names(request))
    for text in (request.prompt, request.negative_prompt or ""):
        read_prompt(text, request.steps, strict=True, words=names)
    list_loras(request)


def _prompts_for(pipe: DiffusionPipeline, request: DrawRequest) -> tuple[str, str | None]:
    """The prompt without the LoRAs that it names, and the negative prompt; where they are not read, their words."""
    from sdopt.pipeline.prompt_encoding import reads_prompts
    from sdopt.pipeline.prompt_grammar import take_adapters
    from sdopt.pipeline.prompt_reading import read_words

    prompt, negative = take_adapters(request.prompt)[0], request.negative_prompt
    if reads_prompts(pipe):
        return prompt, negative
    return read_words(prompt), None if negative is None else read_words(negative)


def prepare(
    pipe: DiffusionPipeline, requests: Sequence[DrawRequest], names: Mapping[str, str] | None = None,
    loras: LoraFinder | None = None, expected_loras: Mapping[str, str] = MappingProxyType({}),
    expected_words: Mapping[str, str] = MappingProxyType({}),
) -> list[PreparedRequest]:  # fmt: skip
    """Check every request, in order. `names` are what the user calls the fields, and `loras` finds what they name; the
    files have the digests of `expected_loras` and `expected_words`, by their names.

    Raises `UsageError` for what this pipeline cannot draw, `ShapeError` for a size that it was not built for, and
    `AdapterError` for a LoRA that is not there or that the engines do not take.
    """
    from sdopt.pipeline.step_limit import require_steps

    schedulers: dict[str | None, SchedulerMixin] = {None: pipe.scheduler}
    prepared = []
    for request in requests:
        check_prompts(request, list(getattr(getattr(pipe.unet, "words", None), "words", ())))
        prompt, negative = _prompts_for(pipe, request)
        _check_task(pipe, request)
        if request.scheduler not in schedulers:
            schedulers[request.scheduler] = _make_scheduler(pipe, request.scheduler)
        scheduler = schedulers[request.scheduler]
        require_steps(scheduler, request.steps, name=(names or {}).get("steps", "steps"))
        image, mask = _open_pictures(request)
        _check_size(pipe, request, image)
        used = load_loras(pipe, request, loras or LoraFinder(), expected_loras)
        embeddings, words = load_words(pipe, request, expected_words)
        prepared.append(PreparedRequest(request, prompt, negative, scheduler, image, mask, used, embeddings, words))
    return prepared


def _make_scheduler(pipe: DiffusionPipeline, name: Any) -> SchedulerMixin:
    from sdopt.pipeline.opened import opened_bundle
    from sdopt.pipeline.schedulers import make_scheduler

    bundle = opened_bundle(pipe)
    manifest = bundle.manifest
    return make_scheduler(name, bundle.scheduler_config, family=manifest.family, prediction=manifest.prediction)


def _check_task(pipe: DiffusionPipeline, request: DrawRequest) -> None:
    bundle = getattr(pipe.unet, "bundle", None)
    if bundle is None:
        return
    name, inpainting = bundle.manifest.name, bundle.manifest.own_task is Task.INPAINT
    if request.task in bundle.manifest.tasks:
        return
    if request.task is Task.TEXT_TO_IMAGE:
        kind = "an inpainting model" if inpainting else "the SDXL refiner"
        example = "image=…, mask_image=…" if inpainting else "image=…"
        raise UsageError(
            f"{name} is {kind}, which starts from a picture and not from a prompt alone",
            hint=f"from Python: sdopt.load(folder)(prompt=…, {example})",
        )
    raise UsageError(f"{name} is an inpainting model, which needs a mask", hint='give the task "inpaint" and a mask')


def _open_pictures(request: DrawRequest) -> tuple[Image.Image | None, Image.Image | None]:
    if isinstance(request, TextToImage):
        return None, None
    image = _open_picture(request.image, "RGB")
    if not isinstance(request, Inpaint):
        return image, None
    mask = _open_picture(request.mask, "L")
    if mask.size != image.size:
        raise UsageError(
            f"the mask {request.mask} has {mask.width}x{mask.height} px, and {request.image} has "
            f"{image.width}x{image.height} px",
            hint="give a mask of the picture's size",
        )
    return image, mask


def _open_picture(path: Path, mode: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a picture that can be read: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read the picture {path}: {error.strerror or error}") from error


def _check_size(pipe: DiffusionPipeline, request: DrawRequest, image: Image.Image | None) -> None:
    """Before any work, and before diffusers, which knows no profiles."""
    bundle = getattr(pipe.unet, "bundle", None)
    if bundle is None:
        return
    usual = bundle.manifest.profile
    width_px, height_px = (usual.width_px.opt, usual.height_px.opt) if image is None else image.size
    if isinstance(request, TextToImage):
        if request.width_px is request.height_px is None:
            return
        width_px, height_px = request.width_px or width_px, request.height_px or height_px
    pipe.unet.check_size(width_px, height_px)
