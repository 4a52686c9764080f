"""Scheduler configs of single files: the published models' of their family."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from sdopt.model.component import Config
from sdopt.model.family import Family, Prediction


def make_scheduler(family: Family, prediction: Prediction | None, *, zero_snr: bool) -> dict[str, Any]:
    """The published models' scheduler config of a family; without `prediction_type` where that is not known.

    `zero_snr` says that the noise schedule ends in pure noise.
    """
    kind = "sdxl" if family.is_xl else family.value
    if family is Family.SD1 and zero_snr:
        # PNDM cannot rescale its betas.
        kind = "sd2"
    text = files("sdopt.checkpoint").joinpath(f"data/schedulers/{kind}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    if zero_snr:
        config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return config if prediction is None else with_prediction(config, prediction)


def with_prediction(config: Config, prediction: Prediction) -> dict[str, Any]:
    """The scheduler config for a UNet that predicts `prediction`."""
    return {**config, "prediction_type": prediction.value}
