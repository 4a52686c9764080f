"""diffusers and transformers configs of a single file, from the names and shapes of its tensors.

What shapes cannot tell (activation, heads, scaling) is the published models' of the family; where they would
have to be guessed, the file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdopt.checkpoint.ldm import Stage, UNetLayout
from sdopt.errors import CheckpointError
from sdopt.model.family import Family, Prediction
from sdopt.weights.safetensors_header import TensorRef

Tensors = Mapping[str, TensorRef]

_PRUNED = "diffusers has no config for such a pruned UNet: give the model as a diffusers folder, if there is one"
_HEAD_CHANNELS = 64
_SD1_HEADS = 8
_TIME_IDS = {Family.SDXL: 6, Family.SDXL_REFINER: 5}
SCALING = {Family.SD1: 0.18215, Family.SD2: 0.18215, Family.SDXL: 0.13025, Family.SDXL_REFINER: 0.13025}


def infer_family(unet: Tensors, *, first_encoder: bool, where: str) -> Family:
    """Family by the UNet's diffusers names; `first_encoder` says whether CLIP-L lies in SDXL's first
    place."""
    if "add_embedding.linear_1.weight" in unet:
        return Family.SDXL if first_encoder else Family.SDXL_REFINER
    found = [ref for key, ref in unet.items() if key.endswith(".proj_in.weight")]
    if not found:
        raise CheckpointError(f"{where}: the UNet has no attention to a text")
    return Family.SD1 if len(found[0].shape) == 4 else Family.SD2


def infer_unet(unet: Tensors, layout: UNetLayout, family: Family, pooled: int | None, where: str) -> dict[str, Any]:
    """UNet config. `pooled` is the width of SDXL's pooled text (its second encoder's projection)."""
    _check_symmetry(layout, where)
    channels = [stage.channels for stage in layout.down]
    time = _shape(unet, "time_embedding.linear_1.weight", where)
    config: dict[str, Any] = {
        "in_channels": _shape(unet, "conv_in.weight", where)[1],
        "out_channels": _shape(unet, "conv_out.weight", where)[0],
        "block_out_channels": channels,
        "layers_per_block": _collapse([len(stage.depths) for stage in layout.down]),
        "down_block_types": ["CrossAttnDownBlock2D" if stage.depths[0] else "DownBlock2D" for stage in layout.down],
        "up_block_types": ["CrossAttnUpBlock2D" if stage.depths[0] else "UpBlock2D" for stage in layout.up],
        "mid_block_type": _middle_type(layout, where),
        "cross_attention_dim": _cross_width(unet, where),
        "use_linear_projection": family is not Family.SD1,
        "upcast_attention": family is Family.SD2,
        "attention_head_dim": _heads(layout, family, where),
        "time_embedding_dim": None if time[0] == 4 * channels[0] else time[0],
        **_transformer_depths(layout, where),
    }
    if family.is_xl:
        config.update(_added_conditions(unet, family, pooled, where))
    return config


def sample_size(family: Family, prediction: Prediction | None) -> int:
    """Side of the latents that the family's published models were trained on."""
    # SD 2.x was published twice: 512 px predicting noise and 768 px predicting v.
    return 64 if family is Family.SD2 and prediction is Prediction.EPSILON else family.native_size_px // 8


def _shape(tensors: Tensors, name: str, where: str) -> tuple[int, ...]:
    ref = tensors.get(name)
    if ref is None or len(ref.shape) < 2:
        raise CheckpointError(
            f"{where}: tensor {name!r} is missing or of no such shape",
            hint="the file may be incomplete: download it again",
        )
    return ref.shape


def _check_symmetry(layout: UNetLayout, where: str) -> None:
    for stage in (*layout.down, *layout.up):
        if not stage.depths:
            raise CheckpointError(f"{where}: a level of the UNet has no resnet", hint=_PRUNED)
        if len({depth > 0 for depth in stage.depths}) > 1:
            raise CheckpointError(f"{where}: a level of the UNet has attention in a part of it", hint=_PRUNED)
    mirrored = [(stage.channels, len(stage.depths) + 1) for stage in reversed(layout.down)]
    if mirrored != [(stage.channels, len(stage.depths)) for stage in layout.up]:
        raise CheckpointError(f"{where}: the UNet's way up does not mirror its way down", hint=_PRUNED)


def _middle_type(layout: UNetLayout, where: str) -> str | None:
    match layout.middle_resnets, layout.middle_depth:
        case 2, int():
            return "UNetMidBlock2DCrossAttn"
        case 1, None:
            return "UNetMidBlock2D"
        case 0, None:
            return None
        case _:
            raise CheckpointError(f"{where}: the middle of the UNet is incomplete", hint=_PRUNED)


def _transformer_depths(layout: UNetLayout, where: str) -> dict[str, Any]:
    """`transformer_layers_per_block`, as one number where there is one, by level, or by layer for pruned
    UNets."""
    mirrored = all(
        len({*down.depths, *up.depths} - {0}) <= 1 for down, up in zip(layout.down, reversed(layout.up), strict=True)
    )
    last = layout.down[-1].depths[0]
    if layout.middle_depth is not None and last not in (0, layout.middle_depth):
        raise CheckpointError(
            f"{where}: the UNet's middle has {layout.middle_depth} transformer blocks, its last level {last}",
            hint=_PRUNED,
        )
    # A level without attention has no number of its own: the last one's is the middle's, else that of all the
    # rest.
    levels = [max(*down.depths, *up.depths) for down, up in zip(layout.down, reversed(layout.up), strict=True)]
    levels[-1] = levels[-1] or layout.middle_depth or 0
    if mirrored:
        known = {depth for depth in levels if depth}
        filler = known.pop() if len(known) == 1 else 1
        return {"transformer_layers_per_block": _collapse([depth or filler for depth in levels])}
    down = [_by_layer(stage) for stage in layout.down]
    down[-1] = down[-1] if last else levels[-1] or 1
    return {
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": [_by_layer(stage) for stage in layout.up],
    }


def _by_layer(stage: Stage) -> int | list[int]:
    return list(stage.depths) if stage.depths[0] else 1


def _collapse(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _heads(layout: UNetLayout, family: Family, where: str) -> int | list[int]:
    """diffusers' `attention_head_dim`, which is the number of heads: 8 in SD 1.x, one for 64 channels
    later."""
    channels = [stage.channels for stage in layout.down]
    unit = _SD1_HEADS if family is Family.SD1 else _HEAD_CHANNELS
    if any(width % unit for width in channels):
        raise CheckpointError(
            f"{where}: widths {channels} are not multiples of {unit}: they do not tell the number of heads",
            hint="give the model as a diffusers folder, whose config says it",
        )
    return _SD1_HEADS if family is Family.SD1 else [width // _HEAD_CHANNELS for width in channels]


def _cross_width(unet: Tensors, where: str) -> int:
    widths = {ref.shape[-1] for key, ref in unet.items() if key.endswith(".attn2.to_k.weight") and ref.shape}
    if len(widths) != 1:
        raise CheckpointError(f"{where}: the UNet attends to texts of {len(widths)} widths, and should to one")
    return widths.pop()


def _added_conditions(unet: Tensors, family: Family, pooled: int | None, where: str) -> dict[str, Any]:
    total = _shape(unet, "add_embedding.linear_1.weight", where)[1]
    ids = _TIME_IDS[family]
    if pooled is None or total <= pooled or (total - pooled) % ids:
        raise CheckpointError(
            f"{where}: SDXL's added condition of {total} does not hold {ids} numbers and a text of {pooled}"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (total - pooled) // ids,
        "projection_class_embeddings_input_dim": total,
    }


def infer_vae(vae: Tensors, family: Family, where: str) -> dict[str, Any]:
    """VAE config by diffusers' names. The scaling factor is the family's: shapes do not tell it."""
    levels = _count_parts(vae, "encoder.down_blocks")
    channels = [_shape(vae, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", where)[0] for i in range(levels)]
    if not channels:
        raise CheckpointError(
            f"{where}: the VAE has no encoder, and sdopt needs both halves",
            hint="give another VAE with --vae",
        )
    layers = {_count_parts(vae, f"encoder.down_blocks.{i}.resnets") for i in range(levels)}
    if len(layers) != 1:
        raise CheckpointError(f"{where}: the VAE's levels differ in depth")
    return {
        "in_channels": _shape(vae, "encoder.conv_in.weight", where)[1],
        "out_channels": _shape(vae, "decoder.conv_out.weight", where)[0],
        "latent_channels": _shape(vae, "decoder.conv_in.weight", where)[1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers.pop(),
        "sample_size": family.native_size_px,
        "scaling_factor": SCALING[family],
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in vae,
    }


def _count_parts(tensors: Tensors, prefix: str) -> int:
    start = prefix + "."
    return len({key.removeprefix(start).partition(".")[0] for key in tensors if key.startswith(start)})


def infer_text_encoder(text: Tensors, *, openclip: bool, projected: bool, where: str) -> dict[str, Any]:
    """Config of a CLIP text model by transformers' names, without the `text_model.` prefix.

    The ids of special tokens are those of the published models' configs: eos 2 makes transformers take the
    state at the largest id, which is the end of text.
    """
    vocabulary, width = _shape(text, "embeddings.token_embedding.weight", where)
    if width % _HEAD_CHANNELS:
        raise CheckpointError(
            f"{where}: the text encoder's width {width} does not tell its number of heads",
            hint="give the model as a diffusers folder, whose config says it",
        )
    # SD 2.x says 512, and has no projection that it could be of.
    projection = 512 if openclip else width
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(text, "encoder.layers.0.mlp.fc1.weight", where)[0],
        "num_hidden_layers": _count_parts(text, "encoder.layers"),
        "num_attention_heads": width // _HEAD_CHANNELS,
        "max_position_embeddings": _shape(text, "embeddings.position_embedding.weight", where)[0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "projection_dim": _shape(text, "text_projection.weight", where)[0] if projected else projection,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
