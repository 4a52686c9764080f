"""Files of textual inversion, as every program writes them, for bundles of tiny-shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 96


def make_vectors(many: int, seed: int, width: int = WIDTH) -> Tensor:
    """As far from the vocabulary's own that pictures differ."""
    return torch.randn(many, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def write_a1111(path: Path, vectors: Tensor) -> Path:
    save_file({"emb_params": vectors.clone()}, path)
    return path


def write_a1111_pickle(path: Path, vectors: Tensor, name: str) -> Path:
    table = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(vectors.clone())}, "name": name,
        "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None,
    }  # fmt: skip
    torch.save(table, path)
    return path


def write_diffusers(path: Path, vectors: Tensor, token: str) -> Path:
    if path.suffix == ".safetensors":
        save_file({token: vectors.clone()}, path)
    else:
        torch.save({token: vectors.clone()}, path)
    return path


def write_sdxl(path: Path, clip_l: Tensor, clip_g: Tensor) -> Path:
    save_file({"clip_l": clip_l.clone(), "clip_g": clip_g.clone()}, path)
    return path
