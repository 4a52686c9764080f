"""A LoRA as a user names it, with how strongly it acts: `ink.safetensors:0.8`, or `ink.safetensors:0.8:0.5`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from sdopt.errors import UsageError

_WEIGHT_LIMIT = 100.0


@dataclass(frozen=True)
class LoraChoice:
    """`source` is a path or a name; `unet` and `text` are the weights in the UNet and in the text encoders."""

    source: str
    unet: float = 1.0
    text: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.source}:{self.unet:g}" if self.unet == self.text else f"{self.source}:{self.unet:g}:{self.text:g}"
        )


class LoraUse(BaseModel):
    """A LoRA of a request. `source` is a path, or the name of a file without its folder.

    `sha256` is that of the file, where it has to be a certain one, and `autov3` that of what lies behind its header, by
    which A1111 and Civitai know it. `name` is that of the adapter in a pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1, max_length=4096)
    unet: float = Field(default=1.0, ge=-_WEIGHT_LIMIT, le=_WEIGHT_LIMIT)
    text: float = Field(default=1.0, ge=-_WEIGHT_LIMIT, le=_WEIGHT_LIMIT)
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    autov3: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    name: str = Field(default="", exclude=True)


class WordUse(BaseModel):
    """A textual inversion of a request, by its file; `sha256` is that of the file, where it has to be a certain one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1, max_length=4096)
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")


def parse_lora(text: str) -> LoraChoice:
    """`FILE`, `FILE:WEIGHT` or `FILE:UNET:TEXT`. What is not a number belongs to the name, as in `C:ink`.

    Raises `UsageError` for an empty name, and for a weight that is not finite or above 100.
    """
    source, weights = text, list[float]()
    while len(weights) < 2:
        head, colon, tail = source.rpartition(":")
        number = _to_number(tail) if colon else None
        if number is None:
            break
        source, weights = head, [number, *weights]
    if not source.strip():
        raise UsageError(f"{text!r} does not name a LoRA", hint="for example ink.safetensors:0.8")
    if wrong := [weight for weight in weights if not abs(weight) <= _WEIGHT_LIMIT]:
        raise UsageError(f"the weight of {source} is {wrong[0]:g}, and has to be from -100 to 100")
    unet = weights[0] if weights else 1.0
    return LoraChoice(source, unet, weights[1] if len(weights) > 1 else unet)


def _to_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return math.inf if math.isnan(number) else number
