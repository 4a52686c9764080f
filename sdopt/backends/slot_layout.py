"""An adapter's two matrices as the inputs of a slot: the shapes of `sdopt.model.slots.slot_shapes`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdopt.model.slots import Slot, input_names


def lay_out(slot: Slot, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the slot from `down`, [rank, in] or [rank, in, height, width], and `up`, [out, rank]."""
    if len(slot.shape) == 2:
        return down.flatten(1).t().contiguous(), up.t().contiguous()
    if slot.shape[2] * slot.shape[3] == 1:
        return down.flatten(1).contiguous(), up.contiguous()
    return down.flatten(2).permute(2, 0, 1).contiguous(), up.contiguous()


def name_inputs(
    slots: Mapping[str, Slot], pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The inputs of the slots that `pairs` (down, up) by layer fill, by their names in the graph."""
    named: dict[str, torch.Tensor] = {}
    for layer, (down, up) in pairs.items():
        named |= dict(zip(input_names(layer), lay_out(slots[layer], down, up), strict=True))
    return named


def join(slot: Slot, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair for several adapters of a layer: their ranks side by side, so that their changes add up."""
    if len(parts) == 1:
        return parts[0]
    linear, large = len(slot.shape) == 2, len(slot.shape) == 4 and slot.shape[2] * slot.shape[3] > 1
    a_axis, b_axis = (1, 0) if linear else (1, 1) if large else (0, 1)
    return torch.cat([a for a, _ in parts], a_axis), torch.cat([b for _, b in parts], b_axis)
