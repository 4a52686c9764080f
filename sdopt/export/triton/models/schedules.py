"""Euler and DDIM of diffusers, in numpy: the same timesteps, and the same arithmetic in fp32.

Settings are those of `sdopt.export.triton.settings`: the products of alphas come from the checkpoint's own scheduler,
so that no noise schedule has to be computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Schedule(Protocol):
    """The steps from noise to a picture's latents, each of shape (pictures, channels, height, width), fp32."""

    timesteps: npt.NDArray[Any]
    initial_scale: np.float32
    """What noise of variance 1 is multiplied by before the first step."""

    def scale(self, sample: Floats, index: int) -> Floats:
        """The sample as the UNet takes it at step `index`."""

    def step(self, predicted: Floats, sample: Floats, index: int) -> Floats:
        """The sample after step `index`, from what the UNet predicted of `sample`."""


def make_schedule(settings: Mapping[str, Any], steps: int) -> Schedule:
    """Raises `ValueError` for a number of steps that the model has not as many timesteps for."""
    limit = int(settings["num_train_timesteps"])
    if not 1 <= steps <= limit:
        raise ValueError(f"steps must be 1 to {limit}, not {steps}")
    return Euler(settings, steps) if settings["kind"] == "euler" else Ddim(settings, steps)


class Euler:
    """`EulerDiscreteScheduler` with linear interpolation and without churn."""

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        self.timesteps = _space_timesteps(settings, steps)
        products = np.asarray(settings["alphas_cumprod"], np.float32)
        all_sigmas = ((1 - products) / products) ** np.float32(0.5)
        sigmas = np.interp(self.timesteps, np.arange(len(all_sigmas)), all_sigmas)
        last = all_sigmas[0] if settings["final_sigma"] == "sigma_min" else 0.0
        self._sigmas = np.append(sigmas, last).astype(np.float32)
        self._predicts_velocity = settings["prediction"] == "v_prediction"
        most = self._sigmas.max()
        self.initial_scale = most if settings["spacing"] != "leading" else (most**2 + 1) ** np.float32(0.5)

    def scale(self, sample: Floats, index: int) -> Floats:
        scaled: Floats = sample / (self._sigmas[index] ** 2 + 1) ** np.float32(0.5)
        return scaled

    def step(self, predicted: Floats, sample: Floats, index: int) -> Floats:
        sigma = self._sigmas[index]
        if self._predicts_velocity:
            original = predicted * (-sigma / (sigma**2 + 1) ** np.float32(0.5)) + sample / (sigma**2 + 1)
        else:
            original = sample - sigma * predicted
        after: Floats = sample + (sample - original) / sigma * (self._sigmas[index + 1] - sigma)
        return after


class Ddim:
    """`DDIMScheduler` with eta 0 and without clipping."""

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        self.timesteps = _space_timesteps(settings, steps).round().astype(np.int64)
        self.initial_scale = np.float32(1)
        self._products = np.asarray(settings["alphas_cumprod"], np.float32)
        self._final = np.float32(settings["final_alpha_cumprod"])
        self._stride = int(settings["num_train_timesteps"]) // steps
        self._predicts_velocity = settings["prediction"] == "v_prediction"
        if self.timesteps.max() >= len(self._products):
            raise ValueError(f"{steps} steps begin after the last timestep of this model; ask for fewer")

    def scale(self, sample: Floats, index: int) -> Floats:
        del index
        return sample

    def step(self, predicted: Floats, sample: Floats, index: int) -> Floats:
        timestep = int(self.timesteps[index])
        before = timestep - self._stride
        signal, noise = _split(self._products[timestep])
        signal_before, noise_before = _split(self._products[before] if before >= 0 else self._final)
        if self._predicts_velocity:
            original = signal * sample - noise * predicted
            predicted = signal * predicted + noise * sample
        else:
            original = (sample - noise * predicted) / signal
        after: Floats = signal_before * original + noise_before * predicted
        return after


def _split(product: np.float32) -> tuple[np.float32, np.float32]:
    """The shares of signal and of noise in a sample, for a product of alphas."""
    return np.sqrt(product), np.sqrt(1 - product)


def _space_timesteps(settings: Mapping[str, Any], steps: int) -> Floats:
    """Falling timesteps as fp32; the three ways of table 2 of arXiv 2305.08891."""
    trained = int(settings["num_train_timesteps"])
    spread: npt.NDArray[Any]
    match settings["spacing"]:
        case "linspace":
            spread = np.linspace(0, trained - 1, steps, dtype=np.float32)[::-1]
        case "leading":
            spread = (np.arange(steps) * (trained // steps))[::-1] + int(settings["steps_offset"])
        case _:
            spread = np.arange(trained, 0, -trained / steps).round() - 1
    return spread.astype(np.float32)
