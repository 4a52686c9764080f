"""How strongly an adapter acts on each layer: one number, or diffusers' table of blocks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales_for_one_adapter

from sdopt.errors import UsageError


@dataclass(frozen=True)
class LayerScales:
    """`everywhere`, but for the layers whose names contain a key of `blocks`."""

    everywhere: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def of(self, layer: str) -> float:
        return next((scale for block, scale in self.blocks.items() if block in layer), self.everywhere)


def read_scales(value: object, name: str) -> LayerScales:
    """A number; None is 1. Raises `UsageError` for anything else, and for NaN and infinity."""
    if value is None:
        return LayerScales()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"the weight of adapter {name!r} is {value!r}, and has to be a number")
    return LayerScales(float(value))


def read_unet_scales(value: object, name: str, config: Any, layers: Collection[str]) -> LayerScales:
    """A number or diffusers' table, as in `{"down": 0.9, "up": {"block_1": [0.4, 0.8, 1.0]}}`.

    `config` is the UNet's and `layers` are the names of its layers. Blocks that the table does not name have 1. Raises
    `UsageError` for a block that this UNet does not have.
    """
    if not isinstance(value, Mapping):
        return read_scales(value, name)
    per_block = int(config.layers_per_block)
    try:
        blocks = _maybe_expand_lora_scales_for_one_adapter(
            dict(value),
            {"down": _with_attention(config.down_block_types), "up": _with_attention(config.up_block_types)},
            {"down": per_block, "up": per_block + 1},
            SimpleNamespace(state_dict=lambda: dict.fromkeys(layers)),
            default_scale=1.0,
        )
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"the weights of adapter {name!r} do not fit this UNet: {error}") from error
    return LayerScales(1.0, {block: read_scales(scale, name).everywhere for block, scale in blocks.items()})


def _with_attention(kinds: Collection[str]) -> list[int]:
    return [number for number, kind in enumerate(kinds) if "CrossAttn" in kind]
