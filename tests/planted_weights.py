"""Random weights in the shapes of LPIPS and CLIP: their figures mean nothing, and obey the same laws."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdopt.fidelity.perceptual.lpips import list_tensors


def write_lpips(path: Path, *, rename: tuple[str, str] | None = None) -> Path:
    """AlexNet and lin layers, which are positive, as the trained ones are."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in list_tensors().items():
        value = torch.randn(shape, generator=generator)
        tensors[name] = value.abs() if name.startswith("lin") else value * (2 / max(1, value[0].numel())) ** 0.5
    if rename:
        tensors[rename[1]] = tensors.pop(rename[0])
    save_file(tensors, path)
    return path


def write_clip(folder: Path, side_px: int = 32) -> Path:
    """A CLIP of a few thousand weights, with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **layers, "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": len(words) - 2,
                "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
            },
            vision_config={**layers, "image_size": side_px, "patch_size": 8},
            projection_dim=8,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    preparation = {
        "size": {"shortest_edge": side_px}, "crop_size": {"height": side_px, "width": side_px},
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder
