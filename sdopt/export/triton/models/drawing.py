"""From prompts to pictures over networks that something else runs: text, the denoising loop, the picture.

`pipeline.json` beside this file says all that differs between checkpoints (`sdopt.export.triton.settings` writes it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .schedules import Floats, make_schedule

Tensors = dict[str, npt.NDArray[Any]]
Run = Callable[[str, Tensors, Sequence[str]], Tensors]
"""(network, inputs, names of outputs) -> outputs; the inputs have the types and the batch that the network takes."""


@dataclass(frozen=True)
class Request:
    """Pictures that share their settings. `negatives` None is not the same as empty texts: SDXL then guides away from
    zeros. `noise` has variance 1 and the shape (pictures, channels, height, width)."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None
    noise: Floats
    steps: int
    guidance_scale: float


class Drawer:
    """Draws with the networks of one checkpoint. `settings` is `pipeline.json`, `folder` holds its tokenizers."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, run: Run) -> None:
        self.settings = settings
        self._run = run
        self._tokenizers = {name: _open_tokenizer(folder, text) for name, text in settings["texts"].items()}

    def draw(self, request: Request) -> npt.NDArray[np.uint8]:
        """Pictures (pictures, height, width, 3). Raises `ValueError` for a number of steps that cannot be had."""
        schedule = make_schedule(self.settings["schedule"], request.steps)
        guided = request.guidance_scale > 1
        conditions = self._make_conditions(request, guided)
        sample = request.noise * schedule.initial_scale
        for index, timestep in enumerate(schedule.timesteps):
            scaled = schedule.scale(np.concatenate([sample, sample]) if guided else sample, index)
            inputs = {"sample": scaled, "timestep": np.asarray([timestep], np.float32), **conditions}
            predicted = self._run_rows("unet", inputs, ["out_sample"])["out_sample"]
            if guided:
                without, with_prompt = np.split(predicted, 2)
                predicted = without + np.float32(request.guidance_scale) * (with_prompt - without)
            sample = schedule.step(predicted, sample, index)
        return self._decode(sample)

    def _make_conditions(self, request: Request, guided: bool) -> Tensors:
        """What the UNet is told beside the sample; with guidance, the rows without the prompt come first."""
        states, pooled = self._encode(request.prompts)
        if guided:
            if request.negatives is None and self.settings["zeros_without_negative"]:
                negative_states, negative_pooled = np.zeros_like(states), np.zeros_like(pooled)
            else:
                negative_states, negative_pooled = self._encode(request.negatives or ("",) * len(request.prompts))
            states = np.concatenate([negative_states, states])
            pooled = np.concatenate([negative_pooled, pooled])
        conditions: Tensors = {"encoder_hidden_states": states}
        if time_ids := self.settings["time_ids"]:
            conditions |= {"text_embeds": pooled, "time_ids": np.asarray([time_ids] * len(states), np.float32)}
        return conditions

    def _encode(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """States (rows, tokens, width of all encoders) and the last encoder's pooled vector (rows, width)."""
        states: list[Floats] = []
        pooled: Floats = np.zeros((len(texts), 0), np.float32)
        for name, text in self.settings["texts"].items():
            ids = np.asarray([entry.ids for entry in self._tokenizers[name].encode_batch(list(texts))], np.int64)
            wanted = [text["states"], *([text["pooled"]] if text["pooled"] else [])]
            outputs = self._run_rows(name, {"input_ids": ids}, wanted)
            states.append(outputs[text["states"]])
            pooled = outputs[text["pooled"]] if text["pooled"] else pooled
        return np.concatenate(states, axis=-1), pooled

    def _decode(self, sample: Floats) -> npt.NDArray[np.uint8]:
        vae = self.settings["vae"]
        latents = sample / np.float32(vae["scaling_factor"])
        if vae["mean"]:
            mean, deviation = (np.asarray(vae[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "deviation"))
            latents = sample * deviation / np.float32(vae["scaling_factor"]) + mean
        pictures = self._run_rows("vae_decoder", {"latent_sample": latents}, ["sample"])["sample"]
        levels = np.clip(pictures.transpose(0, 2, 3, 1) * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
        rounded: npt.NDArray[np.uint8] = levels.round().astype(np.uint8)
        return rounded

    def _run_rows(self, network: str, inputs: Tensors, outputs: Sequence[str]) -> dict[str, Floats]:
        """Any number of rows through a network of fixed or bounded batch; what is too few is padded with the last row.

        An input of one axis (the timestep) goes to every run as it is.
        """
        settings = self.settings["networks"][network]
        least, most = settings["rows"]
        rows = max(len(value) for value in inputs.values())
        runs: list[Tensors] = []
        for start in range(0, rows, most):
            count = min(most, rows - start)
            part = {
                name: (value if value.ndim == 1 else _cut(value, start, count, least)).astype(settings["inputs"][name])
                for name, value in inputs.items()
            }
            runs.append(self._run(settings["model"], part, outputs))
        return {name: np.concatenate([run[name] for run in runs])[:rows].astype(np.float32) for name in outputs}


def make_noise(seeds: Sequence[int], shape: Sequence[int]) -> Floats:
    """Noise of variance 1 (seeds, *shape): each picture's depends on its seed alone. numpy's Philox, not torch's."""
    return np.stack([np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds])


def _cut(value: npt.NDArray[Any], start: int, count: int, least: int) -> npt.NDArray[Any]:
    part = value[start : start + count]
    return np.concatenate([part, *[part[-1:]] * (least - count)])


def _open_tokenizer(folder: Path, text: Mapping[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / text["tokenizer"]))
    tokenizer.enable_truncation(text["tokens"])
    tokenizer.enable_padding(length=text["tokens"], pad_id=text["pad_id"], pad_token=text["pad_token"])
    return tokenizer
