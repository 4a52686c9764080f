"""CLIP from a folder of transformers: whether a picture shows what its prompt says, and features for FID.

The CLIP score is 100 times the cosine of picture and prompt (Hessel et al., "CLIPScore", 2021, without its clipping at
0). A prompt longer than the model's text is cut, as CLIP itself reads no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdopt.errors import CheckpointError
from sdopt.fidelity.metrics import Picture


class Clip:
    """A CLIP model in fp32 on the CPU. Raises `CheckpointError` for a folder that transformers cannot open."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            self._model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
            self._tokenizer: Any = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            self._preparation = _read_preparation(folder)
        except Exception as error:  # transformers raises nearly anything for a folder that is not what it seems
            reason = str(error).partition("\n")[0][:200]
            raise CheckpointError(f"{folder} is not a CLIP model that transformers can open: {reason}") from error

    def find_features(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        """Features of each picture, (pictures, width), of length 1."""
        found = []
        with torch.inference_mode():
            for picture in pictures:  # one at a time: memory is that of one
                pixels = prepare_picture(picture, self._preparation)
                found.append(_as_features(self._model.get_image_features(pixel_values=torch.from_numpy(pixels))))
        return np.concatenate(found)

    def find_text_features(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        found = []
        with torch.inference_mode():
            for prompt in prompts:
                length = self._model.config.text_config.max_position_embeddings
                words = self._tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
                found.append(_as_features(self._model.get_text_features(**words)))
        return np.concatenate(found)


@dataclass(frozen=True)
class Preparation:
    """What a picture is brought to: sides in pixels, mean and spread of each channel. The values are CLIP's own."""

    resize_px: int = 224
    crop_px: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    spread: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


def _read_preparation(folder: Path) -> Preparation:
    """From `preprocessor_config.json`, which has sizes as numbers in old folders and as tables in new ones."""
    values = json.loads((folder / "preprocessor_config.json").read_bytes())
    size, crop = values["size"], values["crop_size"]
    return Preparation(
        int(size["shortest_edge"] if isinstance(size, dict) else size),
        int(crop["height"] if isinstance(crop, dict) else crop),
        tuple(values["image_mean"]), tuple(values["image_std"]),
    )  # fmt: skip


def prepare_picture(picture: Picture, preparation: Preparation) -> NDArray[np.float32]:
    """The smaller side resized (bicubic), the middle cut out, and normalised: [1,3,side,side].

    What transformers' processor does with Pillow; with torchvision it resizes otherwise, so that scores would depend on
    what is installed.
    """
    from PIL import Image

    image = Image.fromarray(picture)
    side, crop = preparation.resize_px, preparation.crop_px
    least = min(image.size)
    width, height = (int(side * length / least) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop) // 2, (height - crop) // 2
    values = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.float32) / 255
    mean, spread = (np.array(row, dtype=np.float32) for row in (preparation.mean, preparation.spread))
    values = (values - mean) / spread
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def _as_features(output: Any) -> NDArray[np.float64]:
    """transformers 5 gives the projected features as the pooled part of an output."""
    values = getattr(output, "pooler_output", output).double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)  # type: ignore[no-any-return]
