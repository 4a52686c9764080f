"""What to build, as a user writes it: a TOML file, command-line flags, or both (flag > file > default)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sdopt.errors import RecipeError, SdoptError, ShapeError, UsageError
from sdopt.model.accepted import describe_values
from sdopt.model.backend_settings import Frozen
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction, parse_prediction
from sdopt.model.lora import parse_lora
from sdopt.model.precision import Precision
from sdopt.model.shape import CHUNK_TOKENS, MOST_CHUNKS, parse_sizes
from sdopt.model.slots import SlotSettings, parse_slots
from sdopt.model.suggest import suggest
from sdopt.model.target import Runtime, Target, TargetField


class Dialect(StrEnum):
    """Which ONNX a graph is written in."""

    NATIVE_ATTENTION = "opset23"
    """opset 23, attention as one `Attention` node."""
    DECOMPOSED = "opset18"
    """opset 18, attention as MatMul and Softmax, for runtimes that know no `Attention`."""


class VerifySettings(Frozen):
    """How the fidelity verdict is reached. Empty `prompts` takes those of the model's card, or the package's own."""

    enabled: bool = True
    """False publishes without parity and without a verdict; the manifest says so."""
    fidelity: bool = True
    """False stops after parity: no picture is drawn, and the manifest says so."""
    prompts: tuple[str, ...] = ()
    steps: int = Field(default=10, ge=1, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    guidance_scale: float = Field(default=5.0, ge=0.0, le=100.0)
    max_psnr_loss: float = Field(default=20.0, ge=0.0, le=100.0)
    """dB that pictures of quantised engines may be farther from torch's than those of the 16-bit engines."""
    min_ssim: float = Field(default=0.9, ge=0.0, le=1.0)
    """Least SSIM of a picture of quantised engines against torch's."""


class BuildRecipe(Frozen):
    """Everything that decides what `sdopt convert` makes. `source` is a path or a Hugging Face id."""

    source: str = ""
    target: TargetField = Target(Runtime.CPU)
    precision: Precision = Precision.AUTO
    component_precision: dict[ComponentName, Precision] = Field(default_factory=dict)
    quantization: str = ""
    """What to quantise: a file of `configs/quantization` by name, or a path. `int8` and `fp8` as precision imply it."""
    require_quantized: bool = False
    """Refuse a bundle in which no block is quantised, because none pays."""
    size: str = ""
    """WIDTHxHEIGHT in pixels, several with commas, a range with `..`; empty takes the model's own size."""
    batch: int = Field(default=1, ge=1, le=64)
    tokens: Literal[77, 154, 231, 308, 385, 462, 539, 616] = 77
    """The longest prompt, in tokens of its text encoders; every multiple of 77 up to it can be drawn."""
    dynamic: bool = False
    dialect: Dialect = Dialect.NATIVE_ATTENTION
    vae: str = ""
    """Another VAE than the checkpoint's: a diffusers VAE folder or a single file."""
    prediction: Prediction | None = None
    """What the UNet predicts, whatever the checkpoint says, and a single file often says nothing; None believes it."""
    ema: bool = False
    """Take the averaged copy of the UNet's weights that some checkpoints hold beside the last ones."""
    lora: tuple[str, ...] = ()
    """Adapters to add to the weights: FILE, FILE:WEIGHT, or FILE:UNET:TEXT."""
    lora_slots: str = ""
    """LoRA slots in the UNet and the text encoders: a rank, as in `64`, or with their layers, as in `attention:64`."""
    require_fused: bool = False
    """Refuse a UNet or text encoder in which attention is not one native layer with a dedicated kernel for each of
    torch's. The VAE's one layer is left out: no TensorRT-RTX plan has a kernel for its head of 512 numbers."""
    max_memory: str = ""
    """Most memory of the host that building engines may take, as in `12GiB`; empty sets no limit."""
    verify: VerifySettings = VerifySettings()

    @field_validator("size")
    @classmethod
    def _size(cls, text: str) -> str:
        if text:
            try:
                parse_sizes(text, (1, 1))
            except ShapeError as error:
                raise ValueError(error.message) from error
        return text

    @field_validator("prediction", mode="before")
    @classmethod
    def _prediction(cls, text: object) -> object:
        return (parse_prediction(text) or text) if isinstance(text, str) else text

    @field_validator("max_memory")
    @classmethod
    def _max_memory(cls, text: str) -> str:
        if text:
            parse_bytes(text)
        return text

    @field_validator("lora")
    @classmethod
    def _lora(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            try:
                parse_lora(text)
            except UsageError as error:
                raise ValueError(error.message) from error
        return texts

    @field_validator("lora_slots")
    @classmethod
    def _lora_slots(cls, text: str) -> str:
        if not text:
            return text
        try:
            return str(parse_slots(text))
        except UsageError as error:
            raise ValueError(error.message) from error

    @field_validator("component_precision")
    @classmethod
    def _component_precision(cls, table: dict[ComponentName, Precision]) -> dict[ComponentName, Precision]:
        for name, precision in table.items():
            if precision.is_quantized:
                raise ValueError(f"{name}: a quantization file says which components become {precision}")
        return table

    def precision_of(self, name: ComponentName) -> Precision:
        """What a component computes in where it is not quantised."""
        precision = self.component_precision.get(name, self.precision)
        return Precision.AUTO if precision.is_quantized else precision

    @property
    def slot_settings(self) -> SlotSettings | None:
        return parse_slots(self.lora_slots) if self.lora_slots else None

    @property
    def quantization_file(self) -> str:
        """Name or path of the quantization file; empty where nothing is to be quantised."""
        return self.quantization or (self.precision.value if self.precision.is_quantized else "")


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]i?)B?\Z")
_UNITS = {"k": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """`'12GiB'` is 12 x 2^30, `'12GB'` is 12 x 10^9. Raises `ValueError` for what is not such an amount, as is
    a number without a unit.
    """
    match = _BYTES.match(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not an amount of memory such as 12GiB")
    base = 1024 if match[2].endswith("i") else 1000
    return int(float(match[1]) * base ** _UNITS[match[2].removesuffix("i")])


def parse_recipe(values: dict[str, Any], *, where: str, names: Mapping[str, str] = MappingProxyType({})) -> BuildRecipe:
    """Validate a table into a recipe. An unknown key or value is named, with the nearest that is known.

    `where` is the name of the file, for the message. `names` are the flags, by key, that the user typed: a value of
    theirs is named so, and without a file. Raises `RecipeError`.
    """
    try:
        return BuildRecipe.model_validate(values)
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        location = ".".join(str(part) for part in first["loc"])
        flag = names.get(location)
        message = _explain(flag, first) if flag else f"{where}: {_explain(location, first)}"
        raise RecipeError(message, hint=_suggest(location, first)) from error


def _explain(name: str, problem: dict[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"there is no recipe key {name!r}"
    if problem["type"] == "value_error":  # a sentence of ours, which quotes the value
        return f"{name}: {str(problem['msg']).removeprefix('Value error, ')}"
    if problem["type"] == "enum":  # the hint lists what is known
        return f"{name} is {problem['input']!r}, which sdopt does not know"
    return f"{name} is {problem['input']!r}, and has to be {_accepted(problem)}"


def _accepted(problem: dict[str, Any]) -> str:
    """What the field takes that a problem is about."""
    if problem["type"] == "literal_error":  # of `tokens`
        return f"{CHUNK_TOKENS} or a multiple of it up to {CHUNK_TOKENS * MOST_CHUNKS}"
    first, *rest = problem["loc"]
    if first == "verify" and rest:
        schema, items = VerifySettings.model_json_schema()["properties"][rest[0]], rest[1:]
    else:
        schema, items = BuildRecipe.model_json_schema()["properties"][first], rest
    return describe_values(schema["items"] if items else schema) or "a table"


def _suggest(location: str, problem: dict[str, Any]) -> str:
    *parents, last = location.split(".")
    known: list[str] = []
    cause = getattr(problem.get("ctx", {}).get("error"), "__cause__", None)
    if isinstance(cause, SdoptError):
        return cause.hint
    if problem["type"] == "extra_forbidden":
        known = list((VerifySettings if parents == ["verify"] else BuildRecipe).model_fields)
    elif problem["type"] == "enum":
        last = str(problem["input"])
        known = [word.strip(" '") for word in str(problem["ctx"]["expected"]).replace(" or ", ",").split(",")]
    return suggest(last, known)
