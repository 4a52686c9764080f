"""The words that a writer has for a layer -> the network, and the layer's name there with underscores for dots.

kohya writes `lora_unet_down_blocks_0_...`, and for SDXL the blocks of the original code; PEFT, diffusers and ComfyUI
write dots. With underscores for dots all of them agree, and no two layers of a network fall together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from sdopt.model.component import ComponentName

_UNET, _TEXT, _TEXT_2 = ComponentName.UNET, ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
# The start of a stem -> its network. OneTrainer has both lora_unet_ and lora_unet. for its two formats; LyCORIS by
# itself, as SimpleTuner uses it, says only lycoris_; ComfyUI names the parts of its own model.
_STARTS: tuple[tuple[re.Pattern[str], ComponentName], ...] = (
    (re.compile(r"(lora_unet[._]|unet\.|(model\.)?diffusion_model\.)"), _UNET),
    (re.compile(r"(lora_te2[._]|text_encoder_2\.|(text_encoders\.)?clip_g\.transformer\.)"), _TEXT_2),
    (re.compile(r"(lora_te1?[._]|text_encoder\.|(text_encoders\.)?clip_[lh]\.transformer\.)"), _TEXT),
)
_PEFT = "base_model.model."
_TEXT_STEM = re.compile(r"(text_model[._])?(encoder[._]layers|embeddings|final_layer_norm)[._]|text_projection$")
# diffusers of 2023 named CLIP's projections as the UNet's.
_OLD_CLIP = re.compile(r"_self_attn_to_(q|k|v|out)$")
_SGM_RESNET = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "norm2": "out_layers_0",
    "conv2": "out_layers_3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_SGM_ENDS = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "conv_norm_out": "out_0",
    "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
    "time_embedding_cond_proj": "time_embed_cond_proj",
    "add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2",
}  # fmt: skip
_BLOCK = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)


def split_stem(stem: str) -> tuple[ComponentName, str]:
    """The network that a stem names, and the rest with underscores for dots."""
    rest = stem
    while rest.startswith(_PEFT):
        rest = rest.removeprefix(_PEFT)
    for start, component in _STARTS:
        if found := start.match(rest):
            return component, _flatten(component, rest[found.end() :])
    rest = rest.removeprefix("lycoris_")
    component = _TEXT if _TEXT_STEM.match(rest) else _UNET
    return component, _flatten(component, rest)


def _flatten(component: ComponentName, rest: str) -> str:
    flat = rest.replace(".", "_")
    if component is _UNET:
        return f"{flat}_0" if flat.endswith("_to_out") else flat
    flat = flat.removeprefix("text_model_")
    return _OLD_CLIP.sub(lambda found: f"_self_attn_{found[1]}_proj", flat)


def index_layers(component: ComponentName, layers: Iterable[str]) -> dict[str, str]:
    """What `split_stem` may leave of a stem -> the layer of the bundle; a UNet's in both namings of its blocks."""
    names = list(layers)
    index = {name.replace(".", "_").removeprefix("text_model_"): name for name in names}
    if component is _UNET:
        index.update({flat: name for flat, name in _name_as_sgm(names) if flat not in index})
    return index


def _name_as_sgm(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names of the original code, which counts resnets and samplers through all levels, with underscores."""
    names = list(names)
    places = _place_blocks(names)
    for name in names:
        flat = name.replace(".", "_")
        if flat in _SGM_ENDS:
            yield _SGM_ENDS[flat], name
        elif (found := _BLOCK.match(name)) and (place := places.get(found[0][:-1])):
            rest = name[found.end() :].replace(".", "_")
            if found[2] == "downsamplers":
                rest = "op" if rest == "conv" else rest
            elif found[2] == "resnets":
                rest = _SGM_RESNET.get(rest, rest)
            yield f"{place}_{rest}", name


def _place_blocks(names: Iterable[str]) -> dict[str, str]:
    """`down_blocks.0.resnets.0` -> `input_blocks_1_0`, for every resnet, transformer and sampler."""
    parts: dict[str, dict[str, set[int]]] = {}
    for name in names:
        if found := _BLOCK.match(name):
            parts.setdefault(found[1], {}).setdefault(found[2], set()).add(int(found[3]))
    return {**_place_down(parts), **_place_middle(parts.get("mid_block", {})), **_place_up(parts)}


Parts = Mapping[str, Mapping[str, set[int]]]


def _levels(parts: Parts, start: str) -> list[str]:
    return sorted(
        (block for block in parts if block.startswith(start)), key=lambda block: int(block.rpartition(".")[2])
    )


def _place_down(parts: Parts) -> dict[str, str]:
    places: dict[str, str] = {}
    at = 1
    for block in _levels(parts, "down_blocks"):
        for layer in sorted(parts[block].get("resnets", ())):
            places[f"{block}.resnets.{layer}"] = f"input_blocks_{at}_0"
            places[f"{block}.attentions.{layer}"] = f"input_blocks_{at}_1"
            at += 1
        if parts[block].get("downsamplers"):
            places[f"{block}.downsamplers.0"] = f"input_blocks_{at}_0"
            at += 1
    return places


def _place_middle(mid: Mapping[str, set[int]]) -> dict[str, str]:
    order = ["resnets.0", *["attentions.0"] * bool(mid.get("attentions")), "resnets.1"]
    return {f"mid_block.{part}": f"middle_block_{at}" for at, part in enumerate(order)}


def _place_up(parts: Parts) -> dict[str, str]:
    places: dict[str, str] = {}
    at = 0
    for block in _levels(parts, "up_blocks"):
        for layer in sorted(parts[block].get("resnets", ())):
            places[f"{block}.resnets.{layer}"] = f"output_blocks_{at}_0"
            places[f"{block}.attentions.{layer}"] = f"output_blocks_{at}_1"
            at += 1
        position = 2 if parts[block].get("attentions") else 1
        places[f"{block}.upsamplers.0"] = f"output_blocks_{at - 1}_{position}"
    return places
