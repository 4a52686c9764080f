"""Full-size Stable Diffusion networks with seeded random weights: the right cost and memory, no download.

The pictures that they draw mean nothing. Weights are scaled by fan-in, so that activations keep a sane size and a
numeric comparison means something. The tokenizer's vocabulary has CLIP's size and no more than letters in it.

It is made in a child process: making it changes how torch initialises modules, and takes the memory of all networks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdopt.processes.channel import JsonTable

_VOCABULARY = 49408
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

UNET_SD15: dict[str, Any] = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP),
}  # fmt: skip
UNET_SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def _byte_characters() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    characters = _byte_characters()
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(first, f"{second}</w>") for first in letters for second in letters]
    vocabulary = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges)]
    vocabulary += [f"<pad{i}>" for i in range(_VOCABULARY - 2 - len(vocabulary))]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Norms of 1, biases of 0, matrices and kernels normal with the variance 1 / fan-in; in fp16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return module.half().eval()


def _make_text_encoder(seed: int, *, big: bool) -> nn.Module:
    width, layers, heads = (1280, 32, 20) if big else (768, 12, 12)
    config = CLIPTextConfig(
        vocab_size=_VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=width, hidden_act="gelu" if big else "quick_gelu",
        bos_token_id=_VOCABULARY - 2, eos_token_id=_VOCABULARY - 1,
    )  # fmt: skip
    return randomise(CLIPTextModelWithProjection(config) if big else CLIPTextModel(config), seed)


def _make_vae(seed: int, *, xl: bool) -> nn.Module:
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024 if xl else 512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if xl else 0.18215,
    )  # fmt: skip
    return randomise(vae, seed)


def make_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: `family`, `folder` and `seed` as `make_checkpoint` takes them."""
    make_checkpoint(arguments["family"], Path(arguments["folder"]), int(arguments["seed"]))
    return {}


def make_checkpoint(family: str, folder: Path, seed: int) -> None:
    """Write a diffusers folder of family `sd15` (1.1 G parameters, 2.1 GB) or `sdxl` (3.5 G, 7 GB)."""
    xl = family == "sdxl"
    tokenizer = make_tokenizer(folder / "_tokenizer")
    # Filled by `randomise`: initialising gigabytes twice takes most of the time.
    _skip_initialisation()
    parts: dict[str, Any] = {
        "unet": randomise(UNet2DConditionModel(**(UNET_SDXL if xl else UNET_SD15)), seed + 3),
        "vae": _make_vae(seed + 2, xl=xl), "text_encoder": _make_text_encoder(seed + 1, big=False),
        "tokenizer": tokenizer,
    }  # fmt: skip
    if xl:
        parts |= {"text_encoder_2": _make_text_encoder(seed + 4, big=True), "tokenizer_2": tokenizer}
    if xl:
        scheduler = EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading")
        pipeline = StableDiffusionXLPipeline(**parts, scheduler=scheduler)
    else:
        scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True)
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    for kind in ("tokenizer", "tokenizer_2")[: 1 + xl]:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / "_tokenizer" / name, folder / kind / name)
    shutil.rmtree(folder / "_tokenizer")


def _skip_initialisation() -> None:
    def leave(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    for name in ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_", "trunc_normal_"):
        setattr(torch.nn.init, name, leave)
