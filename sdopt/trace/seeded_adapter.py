"""A seeded adapter in every slot of a network, for parity: torch gets the changed weights, the engine the slots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sdopt.model.slots import Slot

# Against a weight that is scaled by fan-in: as strong as adapters that were trained.
_STRENGTH = 0.1
_RANK = 4


def make_adapter(slots: Iterable[Slot], most_rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) fp32 by layer, [rank, in, *kernel] and [out, rank]. Neighbours have other ranks, from 1 to 4."""
    pairs = {}
    for number, slot in enumerate(slots):
        out_channels, *inputs = slot.shape
        rank = min(most_rank, 1 + number % _RANK)
        generator = torch.Generator().manual_seed(number)
        down = torch.randn((rank, *inputs), generator=generator) / math.sqrt(math.prod(inputs))
        up = torch.randn((out_channels, rank), generator=generator) * (_STRENGTH / math.sqrt(rank))
        pairs[slot.layer] = (down, up)
    return pairs


def apply_adapter(network: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add up @ down to the weight of each layer, in place."""
    modules = {name.removeprefix("network."): module for name, module in network.named_modules()}
    with torch.inference_mode():
        for layer, (down, up) in pairs.items():
            weight: Tensor = modules[layer].weight
            weight += (up @ down.flatten(1)).reshape(weight.shape)
