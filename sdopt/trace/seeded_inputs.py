"""Inputs of a network for parity and for measuring: seeded, and of the magnitudes that it sees in use."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sdopt.model.component import ComponentName, ComponentSpec, Config, TensorSpec
from sdopt.model.shape import Extent
from sdopt.weights.to_torch import TORCH_DTYPES

_TIMESTEP = 601.0


def make_inputs(spec: ComponentSpec, config: Config, extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """Seeded inputs of the magnitudes that a network sees in use, in the graph's dtypes and usual shapes."""
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    return {tensor.name: _make_input(spec, tensor, config, extents, generator) for tensor in spec.inputs}


def _make_input(
    spec: ComponentSpec, tensor: TensorSpec, config: Config, extents: Mapping[str, Extent], generator: torch.Generator
) -> Tensor:
    shape, dtype = tensor.shape(extents), TORCH_DTYPES[tensor.dtype]
    match tensor.name:
        case "input_ids":
            ids = torch.randint(0, int(config["vocab_size"]) - 2, shape, generator=generator)
            # CLIP pools at the end token: each row has one, at a place of its own.
            ends = torch.randint(2, shape[1], (shape[0],), generator=generator)
            end = int(config["vocab_size"]) - 1
            return torch.where(torch.arange(shape[1]) >= ends[:, None], end, ids)
        case "timestep":
            return torch.full(shape, _TIMESTEP, dtype=dtype)
        case "time_ids":
            height, width = float(extents["height"].opt), float(extents["width"].opt)
            row = torch.tensor([height, width, 0.0, 0.0, height, width])[: shape[1]]
            return row.expand(shape).to(dtype).contiguous()
        case "latent_sample":
            return (torch.randn(shape, generator=generator) / float(config.get("scaling_factor") or 1.0)).to(dtype)
        case "sample" if spec.name is ComponentName.VAE_ENCODER:
            return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)
        case _:
            return torch.randn(shape, generator=generator).to(dtype)
