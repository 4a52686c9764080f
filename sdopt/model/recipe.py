"""What to build, as a user writes it: a TOML file, command-line flags, or both (flag > file > default)."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sdopt.errors import RecipeError, ShapeError
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction
from sdopt.model.precision import Precision
from sdopt.model.shape import parse_size


class Target(StrEnum):
    """Where the engines will run. `CPU` takes the fastest runtime that this machine has."""

    CPU = "cpu"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class Dialect(StrEnum):
    """Which ONNX a graph is written in."""

    NATIVE_ATTENTION = "opset23"
    """opset 23, attention as one `Attention` node."""
    DECOMPOSED = "opset18"
    """opset 18, attention as MatMul and Softmax, for runtimes that know no `Attention`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OpenVINOSettings(_Frozen):
    kind: Literal["openvino"] = "openvino"
    inference_precision: Literal[Precision.FP32, Precision.BF16] = Precision.FP32


class OnnxRuntimeSettings(_Frozen):
    kind: Literal["onnxruntime"] = "onnxruntime"
    low_memory: bool = False
    """Load with a third less memory and without the optimiser: for parity, where a graph runs once."""


class TorchSettings(_Frozen):
    """The baseline: torch eager, or compiled, on the bundle's own weights."""

    kind: Literal["torch"] = "torch"
    precision: Literal[Precision.FP32, Precision.BF16] = Precision.FP32
    compile: bool = False
    attention: Literal["sdpa", "math"] = "sdpa"


BackendSettings = Annotated[OpenVINOSettings | OnnxRuntimeSettings | TorchSettings, Field(discriminator="kind")]


class VerifySettings(_Frozen):
    """How the fidelity verdict is reached. Empty `prompts` takes those of the model's card, or the package's own."""

    enabled: bool = True
    """False publishes without parity and without a verdict; the manifest says so."""
    fidelity: bool = True
    """False stops after parity: no picture is drawn, and the manifest says so."""
    prompts: tuple[str, ...] = ()
    steps: int = Field(default=10, ge=1, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    guidance_scale: float = Field(default=5.0, ge=0.0, le=100.0)


class BuildRecipe(_Frozen):
    """Everything that decides what `sdopt convert` makes. `source` is a path or a Hugging Face id."""

    source: str = ""
    target: Target = Target.CPU
    precision: Precision = Precision.AUTO
    component_precision: dict[ComponentName, Precision] = Field(default_factory=dict)
    size: str = ""
    """WIDTHxHEIGHT in pixels; empty takes the model's own size."""
    batch: int = 1
    tokens: Literal[77] = 77
    dynamic: bool = False
    dialect: Dialect = Dialect.NATIVE_ATTENTION
    vae: str = ""
    """Another VAE than the checkpoint's: a diffusers VAE folder or a single file."""
    prediction: Prediction | None = None
    """Overrides what the checkpoint says of its UNet; a single file often says nothing."""
    verify: VerifySettings = VerifySettings()

    @field_validator("batch")
    @classmethod
    def _batch(cls, batch: int) -> int:
        if not 1 <= batch <= 64:
            raise ValueError(f"batch must be 1 to 64, not {batch}")
        return batch

    @model_validator(mode="after")
    def _size(self) -> BuildRecipe:
        if self.size:
            try:
                parse_size(self.size)
            except ShapeError as error:
                raise ValueError(str(error)) from error
        return self

    def precision_of(self, name: ComponentName) -> Precision:
        return self.component_precision.get(name, self.precision)


def parse_recipe(values: dict[str, Any], *, where: str) -> BuildRecipe:
    """Validate a table into a recipe. An unknown key or value is named, with the nearest that is known.

    `where` is the file's name or "the command line", for the message. Raises `RecipeError`.
    """
    try:
        return BuildRecipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{where}: {_explain(location, dict(first))}", hint=_suggest(location, dict(first))
        ) from error


def _explain(location: str, problem: dict[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"there is no recipe key {location!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{location or 'recipe'}: {message}" + (f" (got {problem['input']!r})" if location else "")


def _suggest(location: str, problem: dict[str, Any]) -> str:
    *parents, last = location.split(".")
    known: list[str] = []
    if problem["type"] == "extra_forbidden":
        known = list((VerifySettings if parents == ["verify"] else BuildRecipe).model_fields)
    elif problem["type"] == "enum":
        last = str(problem["input"])
        known = [word.strip(" '") for word in str(problem["ctx"]["expected"]).replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(last, known, n=1)
    return (
        f"did you mean {near[0]!r}? Known: {', '.join(known)}"
        if near
        else (f"known: {', '.join(known)}" if known else "")
    )
