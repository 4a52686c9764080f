"""Where the engines of a bundle will run: a runtime and, for engines made ahead of time, the GPU generations.

Written `cpu`, `openvino`, `onnxruntime`, `cuda`, `tensorrt`, `rtx` (one plan for Ampere and all later) or
`rtx:sm86,sm89` (one plan for each compute capability).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from sdopt.errors import RecipeError
from sdopt.model.suggest import suggest

PORTABLE = "ampere+"
"""The generation of a plan that is for no single one: Ampere and all later."""

_GENERATION = re.compile(r"sm[1-9]\d{1,2}\Z")


class Runtime(StrEnum):
    """What runs the engines. `CPU` takes the fastest runtime that the building machine has."""

    CPU = "cpu"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"
    CUDA = "cuda"
    """ONNX Runtime on an NVIDIA GPU."""
    TENSORRT = "tensorrt"
    """General TensorRT, built for the GPU that is in the building machine."""
    RTX = "rtx"
    """TensorRT-RTX, built for any generation on any machine."""

    @property
    def makes_plans(self) -> bool:
        return self in (Runtime.TENSORRT, Runtime.RTX)


@dataclass(frozen=True)
class Target:
    """`generations` are compute capabilities such as `sm89`, only of `RTX`; empty is the portable plan."""

    runtime: Runtime
    generations: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.runtime}:{','.join(self.generations)}" if self.generations else self.runtime.value


def parse_target(text: str) -> Target:
    """Raises `RecipeError` that names the nearest target, or the generation that is none."""
    word, colon, rest = text.strip().lower().partition(":")
    if word not in list(Runtime):
        raise RecipeError(f"there is no target {text!r}", hint=suggest(word, Runtime, more=", rtx:sm89"))
    runtime = Runtime(word)
    generations = tuple(dict.fromkeys(part.strip() for part in rest.split(","))) if colon else ()
    if generations and runtime is not Runtime.RTX:
        raise RecipeError(
            f"the target {word} takes no GPU generation: {text!r}",
            hint="only TensorRT-RTX builds for another machine's GPU: --target rtx:sm89",
        )
    if bad := [name for name in generations if not _GENERATION.match(name)]:
        raise RecipeError(
            f"{bad[0]!r} is not a GPU generation",
            hint="a generation is named by its compute capability, as in --target rtx:sm86,sm89,sm120",
        )
    return Target(runtime, generations)


def _validate(value: Any) -> Target:
    if isinstance(value, Target):
        return value
    if not isinstance(value, str):
        raise ValueError("a target is a text such as 'cpu' or 'rtx:sm89'")
    try:
        return parse_target(value)
    except RecipeError as error:
        raise ValueError(error.message) from error


TargetField = Annotated[
    Target,
    PlainValidator(_validate),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["cpu", "rtx:sm89"]}),
]
"""A `Target` in a recipe or a manifest, where it is its text."""
