"""What to quantise, as a TOML file says it: which layers, in which scheme, calibrated how, and in which groups judged.

The files that come with sdopt are in `configs/quantization`. Layers are named as torch names them
(`down_blocks.0.attentions.0.proj_in`), and patterns are those of a shell.
"""

from __future__ import annotations

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdopt.errors import RecipeError
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType


class Scheme(StrEnum):
    """How the layers of a group are quantised. Scales are symmetric: no zero point but 0."""

    INT8 = "int8"
    """Weights in INT8 with a scale for each output channel, activations in INT8 with one scale: integer arithmetic."""
    FP8 = "fp8"
    """The same in FP8 (E4M3)."""
    INT8_WEIGHTS = "int8-weights"
    """Weights alone, in INT8 with a scale for each output channel. CPU runtimes may round inputs to 8 bits, too, while
    they run; what that does is part of the error that is measured."""
    INT4_WEIGHTS = "int4-weights"
    """Weights alone, in INT4 with a scale for each output channel and block of inputs."""

    @property
    def weight_dtype(self) -> DType:
        """What a weight is stored in; two INT4 numbers share a byte."""
        return {Scheme.FP8: DType.FP8, Scheme.INT4_WEIGHTS: DType.UINT8}.get(self, DType.INT8)

    @property
    def quantizes_activations(self) -> bool:
        return self in (Scheme.INT8, Scheme.FP8)

    @property
    def largest(self) -> float:
        """The largest number that the scale maps to."""
        return {Scheme.FP8: 448.0, Scheme.INT4_WEIGHTS: 7.0}.get(self, 127.0)


INT4_BLOCK = 128
"""Inputs that share a scale in INT4; a layer whose inputs are not a multiple of it stays as it is."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationSettings(_Frozen):
    """Where the inputs come from, and how a scale is made of them.

    Every trajectory is one prompt drawn with one guidance scale in `steps` steps, which reach over all timesteps.
    """

    prompts: str = ""
    """A file of `configs/prompts`, without its ending, or a path: one prompt a line.

    Empty is the file `prompts.txt` in the checkpoint's folder, where it has one, else `general`.
    """
    trajectories: int = Field(default=4, ge=1, le=256)
    held_out: int = Field(default=2, ge=1, le=64)
    """Further trajectories, of other prompts, that no scale is made of: errors are measured on their inputs."""
    steps: int = Field(default=4, ge=1, le=200)
    guidance_scales: tuple[Annotated[float, Field(ge=0.0, le=100.0)], ...] = Field(default=(7.5, 4.0), min_length=1)
    """Taken in turn, one for each trajectory."""
    seed: int = Field(default=1000, ge=0, lt=2**63)
    scales: Literal["max", "percentile", "entropy"] = "percentile"
    percentile: float = Field(default=99.99, gt=50.0, le=100.0)
    smoothquant_alpha: float = Field(default=0.0, ge=0.0, lt=1.0)
    """0 leaves the linear layers' inputs as they are; above it, SmoothQuant moves their outliers into the weights."""


class ComponentQuantization(_Frozen):
    """One component: `scheme` is tried for each group of its layers, but for those that match `keep`."""

    scheme: Scheme
    keep: tuple[str, ...] = ()
    """Patterns of the layers that stay as they are."""
    classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of a class of layers -> its patterns. Layers of one block and one class are judged together."""
    by_block: bool = True
    """False judges all layers together, as one group."""

    def group_of(self, layer: str) -> str:
        """The group that a layer is judged in, as in `down_blocks.0 transformer`; empty for one that is kept."""
        if any(fnmatchcase(layer, pattern) for pattern in self.keep):
            return ""
        if not self.by_block:
            return "all layers"
        block = _block_of(layer)
        for name, patterns in self.classes.items():
            if any(fnmatchcase(layer, pattern) for pattern in patterns):
                return f"{block} {name}"
        return block


_BLOCK = re.compile(r"(?:(?:en|de)coder\.)?(?:(?:down|up)_blocks\.\d+|mid_block)|(?:\w+\.)*?encoder\b")


def _block_of(layer: str) -> str:
    match = _BLOCK.match(layer)
    return match[0] if match else layer.rpartition(".")[0] or layer


class QuantizationSettings(_Frozen):
    """A whole file. A component that it does not name stays in 16 bits."""

    components: dict[ComponentName, ComponentQuantization] = Field(min_length=1)
    calibration: CalibrationSettings = CalibrationSettings()
    judge_speed: bool = True
    """False keeps blocks whatever their speed here: for engines that will run on another machine."""
    held_out_error: float = Field(default=0.05, gt=0.0, le=1.0)
    """Largest relative error |a-b|/|b| of a component's outputs on held-out inputs, all its groups together."""

    @model_validator(mode="after")
    def _components_can(self) -> QuantizationSettings:
        for name, settings in self.components.items():
            if settings.scheme.quantizes_activations and name is not ComponentName.UNET:
                raise ValueError(f"{name} takes weights alone: int8-weights or int4-weights")
        return self


def parse_quantization(values: dict[str, Any], *, where: str) -> QuantizationSettings:
    """Validate a table. Raises `RecipeError` that names the file, the key and what is wrong with it."""
    try:
        return QuantizationSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise RecipeError(f"{where}: {location + ': ' if location else ''}{message}") from error
