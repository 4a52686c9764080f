"""A fault to plant: a VAE whose inner values fp16 cannot hold, and whose pictures are as before."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.conftest import TINY_SHAPES

DECODER_LAYER = "decoder.mid_block.resnets.0.conv1"
ENCODER_LAYER = "encoder.mid_block.resnets.0.conv1"
# A power of two changes no bit of a mantissa. These layers' values are about 10, and fp16 ends at 65504.
_FACTOR = 2.0**14


def plant_overflow(folder: Path, layers: Iterable[str] = (DECODER_LAYER, ENCODER_LAYER)) -> Path:
    """Copy tiny-shapes to `folder`, with these convolutions' outputs scaled; the norm that follows takes it back."""
    shutil.copytree(TINY_SHAPES, folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for layer in layers:
        for part in ("weight", "bias"):
            tensors[f"{layer}.{part}"] *= _FACTOR
    save_file(tensors, path)
    return folder
