"""The networks of a pipeline and their named inputs and outputs, derived from their configs.

Tensor names are those that optimum's ONNX pipelines use, so that its runtime loads the graphs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sdopt.errors import CheckpointError
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.shape import Extent


class ComponentName(StrEnum):
    """A network of the pipeline; the value is its folder in a bundle. In the order in which a picture needs them."""

    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    UNET = "unet"
    VAE_DECODER = "vae_decoder"
    VAE_ENCODER = "vae_encoder"

    @property
    def takes_adapters(self) -> bool:
        """LoRAs change the UNet and text encoders."""
        return self is ComponentName.UNET or self.is_text_encoder

    @property
    def is_text_encoder(self) -> bool:
        return self in (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. An axis is a fixed size or a name from `ShapeProfile.axis_extents`."""

    name: str
    dtype: DType
    axes: tuple[int | str, ...]

    def shape(self, extents: Mapping[str, Extent]) -> tuple[int, ...]:
        """The usual (opt) shape under a profile's extents."""
        return tuple(axis if isinstance(axis, int) else extents[axis].opt for axis in self.axes)


@dataclass(frozen=True)
class Tolerance:
    """Largest difference from torch that still counts as the same network, over the whole output."""

    relative_l2: float
    cosine_distance: float

    def scaled(self, factor: float) -> Tolerance:
        return Tolerance(self.relative_l2 * factor, self.cosine_distance * factor)


@dataclass(frozen=True)
class ComponentSpec:
    """A component as graphs and engines see it. `tolerance` is for fp32 arithmetic on both sides."""

    name: ComponentName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: Tolerance

    @property
    def named_axes(self) -> tuple[str, ...]:
        """The axes whose sizes a profile decides, each once."""
        axes = (axis for tensor in (*self.inputs, *self.outputs) for axis in tensor.axes if isinstance(axis, str))
        return tuple(dict.fromkeys(axes))

    def input(self, name: str) -> TensorSpec:
        return next(spec for spec in self.inputs if spec.name == name)


Config = Mapping[str, Any]

# fp32 against fp32 differs only by the order of sums; the margin covers deep networks (SDXL's UNet has 70 blocks).
_FP32 = Tolerance(relative_l2=1e-3, cosine_distance=1e-6)


def describe_component(name: ComponentName, config: Config, family: Family, dtype: DType) -> ComponentSpec:
    """Inputs and outputs of a component from its diffusers or transformers config.

    `dtype` is the graph's float type. Token ids are int64; the timestep is an fp32 scalar in every graph, because
    schedulers with uneven spacing give fractions of a step, and fp16 cannot hold 999 and a half.
    """
    match name:
        case ComponentName.TEXT_ENCODER | ComponentName.TEXT_ENCODER_2:
            return _describe_text_encoder(name, config, dtype)
        case ComponentName.UNET:
            return _describe_unet(config, family, dtype)
        case ComponentName.VAE_DECODER:
            latent = TensorSpec(
                "latent_sample", dtype, ("batch", int(config["latent_channels"]), "latent_height", "latent_width")
            )
            image = TensorSpec("sample", dtype, ("batch", int(config["out_channels"]), "height", "width"))
            return ComponentSpec(name, (latent,), (image,), _FP32)
        case ComponentName.VAE_ENCODER:
            image = TensorSpec("sample", dtype, ("batch", int(config["in_channels"]), "height", "width"))
            moments = TensorSpec(
                "latent_parameters",
                dtype,
                ("batch", 2 * int(config["latent_channels"]), "latent_height", "latent_width"),
            )
            return ComponentSpec(name, (image,), (moments,), _FP32)


def has_projection(config: Config) -> bool:
    """Whether a CLIP text model ends in a text projection (SDXL's second encoder, the refiner's only one)."""
    return "CLIPTextModelWithProjection" in (config.get("architectures") or ())


def _describe_text_encoder(name: ComponentName, config: Config, dtype: DType) -> ComponentSpec:
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    hidden = ("batch", "tokens", width)
    pooled = (
        TensorSpec("text_embeds", dtype, ("batch", int(config["projection_dim"])))
        if has_projection(config)
        else TensorSpec("pooler_output", dtype, ("batch", width))
    )
    last = TensorSpec("last_hidden_state", dtype, hidden)
    # Every hidden state before the last is an output: SDXL conditions on the last but one, clip_skip may ask for any.
    states = tuple(TensorSpec(f"hidden_states.{i}", dtype, hidden) for i in range(layers))
    first_two = (pooled, last) if has_projection(config) else (last, pooled)
    return ComponentSpec(
        name, (TensorSpec("input_ids", DType.INT64, ("batch", "tokens")),), (*first_two, *states), _FP32
    )


def _describe_unet(config: Config, family: Family, dtype: DType) -> ComponentSpec:
    latent = ("latent_height", "latent_width")
    inputs = [
        TensorSpec("sample", dtype, ("cfg_batch", int(config["in_channels"]), *latent)),
        TensorSpec("timestep", DType.FP32, ()),
        TensorSpec("encoder_hidden_states", dtype, ("cfg_batch", "prompt_tokens", cross_attention_width(config))),
    ]
    if config.get("addition_embed_type") == "text_time":
        ids, pooled = time_ids_layout(config, family)
        inputs.append(TensorSpec("text_embeds", dtype, ("cfg_batch", pooled)))
        inputs.append(TensorSpec("time_ids", dtype, ("cfg_batch", ids)))
    if config.get("time_cond_proj_dim"):
        inputs.append(TensorSpec("timestep_cond", dtype, ("cfg_batch", int(config["time_cond_proj_dim"]))))
    output = TensorSpec("out_sample", dtype, ("cfg_batch", int(config["out_channels"]), *latent))
    return ComponentSpec(ComponentName.UNET, tuple(inputs), (output,), _FP32)


def cross_attention_width(config: Config) -> int:
    """Width of the text states that the UNet attends to."""
    width = config["cross_attention_dim"]
    return int(width) if isinstance(width, int) else int(width[0])


def time_ids_layout(config: Config, family: Family) -> tuple[int, int]:
    """(number of time ids, width of the pooled text) of an SDXL UNet.

    Its projection takes ids x addition_time_embed_dim + pooled. The base model has 6 ids (original size, crop, target
    size), the refiner 5 (original size, crop, aesthetic score).
    """
    total, each = int(config["projection_class_embeddings_input_dim"]), int(config["addition_time_embed_dim"])
    ids = 5 if family is Family.SDXL_REFINER else 6
    if total <= ids * each:
        raise CheckpointError(f"an SDXL UNet with a projection of {total} has no room for {ids} time ids of {each}")
    return ids, total - ids * each


def vae_factor(config: Config) -> int:
    """Pixels per latent element along a side: 2 for each level but the last."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def native_size_px(unet: Config, pixels_per_latent: int, family: Family) -> tuple[int, int]:
    """Width and height of the pictures that a model was trained on, by its UNet's config or else by its family."""
    side = unet.get("sample_size")
    sides = side if isinstance(side, list | tuple) else (side, side)
    # A UNet's config counts in latent elements; old ones leave it out.
    height_px, width_px = (int(s) * pixels_per_latent if s else family.native_size_px for s in sides)
    return width_px, height_px


def unet_factor(config: Config) -> int:
    """What a latent side must be a multiple of, so that the UNet's skip connections meet."""
    return int(2 ** (len(config["block_out_channels"]) - 1))
