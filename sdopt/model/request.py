"""A request to draw, as pure data: one union of tasks, which the command line, `sdopt.draw` and files share.

`parse_request` makes one of a table and says in a sentence what is wrong with it. Without a `task`, a table asks for
text to image. Knows neither torch nor the disk: pictures to start from are named by their paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    TypeAdapter,
    ValidationError,
)

from sdopt.errors import UsageError
from sdopt.model.accepted import describe_values
from sdopt.model.lora import LoraUse, WordUse
from sdopt.model.samplers import NAMES_IN_WORDS, SchedulerName, parse_scheduler
from sdopt.model.task import Task

SEED_LIMIT = 2**63
STEPS_LIMIT = 1000
PROMPT_LIMIT = 20_000


def _to_scheduler(value: object) -> object:
    return parse_scheduler(value) if isinstance(value, str) else value


def _to_whole(value: object) -> object:
    """A text of digits is a number, as in an infotext; a bool is not, and 20.5 steps are an error, never 20."""
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 40 else value


_Whole = Annotated[StrictInt, BeforeValidator(_to_whole)]
_Side = Annotated[StrictInt, Field(ge=8, le=1 << 16), BeforeValidator(_to_whole)]
_Skip = Annotated[StrictInt, Field(ge=1, le=64), BeforeValidator(_to_whole)]


class _Request(BaseModel):
    """What every task has. The same request on the same bundle and machine draws the same picture, bit for bit.

    `scheduler` None is the checkpoint's own. A `negative_prompt` of None is not quite the same as an empty one: SDXL
    then guides away from zeros. `clip_skip` counts as diffusers does: 1 takes the last but one layer (A1111 calls that
    2). Prompts are as typed: `sdopt.pipeline.prompt_grammar` says how they are read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(max_length=PROMPT_LIMIT)
    negative_prompt: str | None = Field(default=None, max_length=PROMPT_LIMIT)
    steps: _Whole = Field(default=20, ge=1, le=STEPS_LIMIT)
    guidance_scale: float = Field(default=7.5, ge=0.0, le=100.0, allow_inf_nan=False)
    seed: _Whole = Field(default=0, ge=0, lt=SEED_LIMIT)
    scheduler: Annotated[SchedulerName, BeforeValidator(_to_scheduler)] | None = None
    clip_skip: _Skip | None = None
    loras: tuple[LoraUse, ...] = Field(default=(), max_length=64)
    """What acts on the picture beside what the prompt names with `<lora:name:weight>`."""
    embeddings: tuple[WordUse, ...] = Field(default=(), max_length=256)
    """Files of textual inversion, whose words the prompts may have."""


class TextToImage(_Request):
    """A picture from a prompt alone. `width_px` and `height_px` None are the bundle's size."""

    task: Literal[Task.TEXT_TO_IMAGE] = Task.TEXT_TO_IMAGE
    width_px: _Side | None = None
    height_px: _Side | None = None


class ImageToImage(_Request):
    """A picture that starts from another, whose size it keeps.

    `strength` is the share of the steps that are done: 0 gives the picture back, 1 leaves nothing of it.
    """

    task: Literal[Task.IMAGE_TO_IMAGE] = Task.IMAGE_TO_IMAGE
    image: Path
    strength: float = Field(default=0.75, gt=0.0, le=1.0, allow_inf_nan=False)


class Inpaint(_Request):
    """A picture in which what is white in `mask`, a picture of the same size, is drawn anew."""

    task: Literal[Task.INPAINT] = Task.INPAINT
    image: Path
    mask: Path
    strength: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)


def _find_task(value: object) -> str:
    if isinstance(value, Mapping):
        return str(value.get("task", Task.TEXT_TO_IMAGE))
    return str(getattr(value, "task", ""))


DrawRequest = Annotated[
    Annotated[TextToImage, Tag(Task.TEXT_TO_IMAGE)]
    | Annotated[ImageToImage, Tag(Task.IMAGE_TO_IMAGE)]
    | Annotated[Inpaint, Tag(Task.INPAINT)],
    Discriminator(_find_task),
]
TASKS: Mapping[str, type[_Request]] = {
    Task.TEXT_TO_IMAGE: TextToImage,
    Task.IMAGE_TO_IMAGE: ImageToImage,
    Task.INPAINT: Inpaint,
}
_REQUESTS: TypeAdapter[DrawRequest] = TypeAdapter(DrawRequest)


def parse_request(values: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> DrawRequest:
    """Validate a table into a request.

    `names` are what the user calls the fields, such as the flags of the command line. Raises `UsageError` that names
    the first bad field, what it was, and what it takes.
    """
    try:
        return _REQUESTS.validate_python(dict(values))
    except ValidationError as error:
        raise UsageError(_describe(error, names or {})) from error


def _describe(error: ValidationError, names: Mapping[str, str]) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if not where:
        return f"task is {_quote(_find_task(first['input']))}, and sdopt knows {', '.join(TASKS)}"
    task, field = where[0], where[1] if len(where) > 1 else ""
    name, value = names.get(field, field), _quote(first["input"])
    if first["type"] == "missing":
        return f"{name} is missing, which {task} needs"
    if first["type"] == "extra_forbidden":
        return f"{name} is not something that {task} knows: it takes {', '.join(TASKS[task].model_fields)}"
    if first["type"] == "string_too_long":
        return f"{name} has {len(str(first['input']))} characters, and {PROMPT_LIMIT} are the most"
    if first["type"] == "string_unicode":
        return f"{name} is not a text: it holds half of a character (a lone surrogate)"
    return f"{name} is {value}, and has to be {accepted_values(TASKS[task], field)}"


def accepted_values(task: type[_Request], field: str) -> str:
    """What a field takes, in words: "a whole number from 1 to 1000"."""
    return describe_values(task.model_json_schema()["properties"][field]) or f"one of {NAMES_IN_WORDS}"


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
