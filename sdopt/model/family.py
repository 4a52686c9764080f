"""The families of Stable Diffusion models that sdopt knows, and what sets them apart."""

from __future__ import annotations

import re
from enum import StrEnum


class Family(StrEnum):
    """A family shares an architecture up to sizes: the same components, inputs and pipeline."""

    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    SDXL_REFINER = "sdxl-refiner"

    @property
    def label(self) -> str:
        """As its makers write it."""
        return {
            Family.SD1: "Stable Diffusion 1", Family.SD2: "Stable Diffusion 2", Family.SDXL: "SDXL",
            Family.SDXL_REFINER: "SDXL refiner",
        }[self]  # fmt: skip

    @property
    def is_xl(self) -> bool:
        return self in (Family.SDXL, Family.SDXL_REFINER)

    @property
    def native_size_px(self) -> int:
        """Side of the square picture that published models of the family were trained on."""
        return {Family.SD1: 512, Family.SD2: 768, Family.SDXL: 1024, Family.SDXL_REFINER: 1024}[self]


class Prediction(StrEnum):
    """What the UNet predicts; the values are diffusers' `prediction_type`."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"


_EPSILON_WORDS = frozenset({"epsilon", "eps", "noise", "epsilon_prediction", "eps_prediction"})
_V_WORDS = frozenset({"v", "v_prediction", "vprediction", "v_pred", "vpred", "velocity", "v_parameterization"})


def parse_prediction(text: str) -> Prediction | None:
    """Any spelling of the two predictions that sdopt knows; None for another word."""
    word = re.sub(r"[\s\-]+", "_", text.strip().strip("\"'").strip().lower())
    if word in _EPSILON_WORDS:
        return Prediction.EPSILON
    return Prediction.V_PREDICTION if word in _V_WORDS else None
