"""Names of the original (CompVis/Stability) UNet and VAE -> diffusers' names, and the layout that the names
tell.

Only names and shapes are read. A tensor that no rule knows keeps its name, and the comparison with the
config's own names refuses it: nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sdopt.errors import CheckpointError
from sdopt.weights.safetensors_header import TensorRef

Tensors = Mapping[str, TensorRef]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "op": "conv",
}  # fmt: skip
_BLOCK = re.compile(r"^((?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)\.(.+)\.(weight|bias)$")


@dataclass(frozen=True)
class Stage:
    """One resolution on the way down or up: its width and, layer by layer, how many transformer blocks follow
    the resnet (0 where there is no attention)."""

    channels: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class UNetLayout:
    """`middle_depth` is None without attention in the middle; `middle_resnets` is 2, 1 or 0."""

    down: tuple[Stage, ...]
    up: tuple[Stage, ...]
    middle_resnets: int
    middle_depth: int | None


def map_unet(tensors: Tensors, where: str) -> tuple[dict[str, TensorRef], UNetLayout]:
    """UNet tensors by diffusers' names, and the layout. `tensors` have no `model.diffusion_model.` prefix."""
    places: dict[str, str] = {}
    down = _walk_down(tensors, places, where)
    up = _walk_up(tensors, places, where)
    depth = _count_transformers(tensors, "middle_block.1")
    names = ["resnets.0", "attentions.0", "resnets.1"] if depth is not None else ["resnets.0"]
    present = [i for i in range(len(names)) if any(key.startswith(f"middle_block.{i}.") for key in tensors)]
    places.update({f"middle_block.{i}": f"mid_block.{names[i]}" for i in present})
    layout = UNetLayout(down, up, sum(names[i].startswith("resnets") for i in present), depth)
    return {_rename_unet(key, places): ref for key, ref in tensors.items()}, layout


def _walk_down(tensors: Tensors, places: dict[str, str], where: str) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    depths: list[int] = []
    channels = 0
    for n in range(1, _count(tensors, "input_blocks")):
        block, place = f"input_blocks.{n}", f"down_blocks.{len(stages)}"
        if f"{block}.0.op.weight" in tensors:
            places[f"{block}.0"] = f"{place}.downsamplers.0"
            stages.append(Stage(channels, tuple(depths)))
            depths = []
            continue
        channels = _read_width(tensors, f"{block}.0", where)
        _place_layer(tensors, places, block, place, depths)
    return (*stages, Stage(channels, tuple(depths)))


def _walk_up(tensors: Tensors, places: dict[str, str], where: str) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    depths: list[int] = []
    channels = 0
    for n in range(_count(tensors, "output_blocks")):
        block, place = f"output_blocks.{n}", f"up_blocks.{len(stages)}"
        channels = _read_width(tensors, f"{block}.0", where)
        _place_layer(tensors, places, block, place, depths)
        # The upsampler follows the resnet, or the attention where there is one.
        position = 2 if depths[-1] else 1
        if f"{block}.{position}.conv.weight" in tensors:
            places[f"{block}.{position}"] = f"{place}.upsamplers.0"
            stages.append(Stage(channels, tuple(depths)))
            depths = []
    return (*stages, Stage(channels, tuple(depths)))


def _place_layer(tensors: Tensors, places: dict[str, str], block: str, place: str, depths: list[int]) -> None:
    layer = len(depths)
    depth = _count_transformers(tensors, f"{block}.1")
    places[f"{block}.0"] = f"{place}.resnets.{layer}"
    if depth is not None:
        places[f"{block}.1"] = f"{place}.attentions.{layer}"
    depths.append(depth or 0)


def _read_width(tensors: Tensors, resnet: str, where: str) -> int:
    ref = tensors.get(f"{resnet}.out_layers.3.weight")
    if ref is None or len(ref.shape) != 4:
        raise CheckpointError(f"{where}: the UNet has no resnet at {resnet}, where Stable Diffusion has one")
    return ref.shape[0]


def _count_transformers(tensors: Tensors, prefix: str) -> int | None:
    return _count(tensors, f"{prefix}.transformer_blocks") if f"{prefix}.proj_in.weight" in tensors else None


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbered parts a prefix has: the largest number and one. Holes show up as missing tensors."""
    numbered = re.compile(re.escape(prefix) + r"\.(\d{1,3})\.")
    return max((int(found[1]) + 1 for key in tensors if (found := numbered.match(key))), default=0)


def _rename_unet(key: str, places: Mapping[str, str]) -> str:
    found = _BLOCK.match(key)
    if found and found[1] in places:
        rest = found[2]
        return f"{places[found[1]]}.{_RESNET.get(rest, rest)}.{found[3]}"
    module, _, last = key.rpartition(".")
    return f"{_UNET_ENDS[module]}.{last}" if module in _UNET_ENDS else key


_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL_PARTS = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}


def map_vae(tensors: Tensors) -> dict[str, TensorRef]:
    """VAE tensors by diffusers' names, without prefix. Names that are diffusers' already stay as they are."""
    levels = _count(tensors, "decoder.up")

    def place_level(found: re.Match[str]) -> str:
        half, level, part = found.groups()
        # The decoder counts its levels from the picture inwards, diffusers from the latents outwards.
        if half == "encoder.down":
            return f"encoder.down_blocks.{level}.{_LEVEL_PARTS[part]}."
        return f"decoder.up_blocks.{levels - 1 - int(level)}.{_LEVEL_PARTS[part]}."

    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (r"^(encoder\.down|decoder\.up)\.(\d+)\.(block|downsample|upsample)\.", place_level),
        (r"^(\w+)\.mid\.block_([12])\.", lambda found: f"{found[1]}.mid_block.resnets.{int(found[2]) - 1}."),
        (r"^(\w+)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
        (r"(?<=\.attentions\.0\.)(norm|q|k|v|proj_out)(?=\.)", lambda found: _ATTENTION[found[1]]),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    )
    renamed = {}
    for key, ref in tensors.items():
        name = key
        for pattern, replace in rules:
            name = re.sub(pattern, replace, name)
        renamed[name] = ref
    return renamed
