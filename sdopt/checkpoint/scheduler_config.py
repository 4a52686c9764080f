"""Scheduler configs of single files, and what a UNet predicts as far as its file says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from sdopt.errors import CheckpointError
from sdopt.model.component import Config
from sdopt.model.family import Family, Prediction

# Keys without meaning as tensors, which trainers leave as signs.
_SIGN_OF_V, _SIGN_OF_ZERO_SNR = "v_pred", "ztsnr"
_SIGNS_OF_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PREDICT_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_SAID = {"epsilon": Prediction.EPSILON, "v": Prediction.V_PREDICTION, "v_prediction": Prediction.V_PREDICTION}


def find_prediction(
    names: Collection[str], metadata: Mapping[str, str], family: Family, where: str
) -> Prediction | None:
    """What the UNet predicts: a sign among the tensors, then the metadata, then the family's habit.

    None for SD 2.x without a sign: it was published both ways. Raises `CheckpointError` for models of the EDM
    kind.
    """
    if any(sign in names for sign in _SIGNS_OF_EDM):
        raise CheckpointError(
            f"{where} was trained with EDM's noise levels, which sdopt does not know",
            hint="sdopt reads models that predict epsilon or v",
        )
    if _SIGN_OF_V in names:
        return Prediction.V_PREDICTION
    for key in _PREDICT_KEYS:
        if metadata.get(key, "").lower() in _SAID:
            return _SAID[metadata[key].lower()]
    return None if family is Family.SD2 else Prediction.EPSILON


def make_scheduler(family: Family, prediction: Prediction | None, names: Collection[str]) -> dict[str, Any]:
    """The published models' scheduler config of a family; without `prediction_type` where that is not
    known."""
    zero_snr = _SIGN_OF_ZERO_SNR in names
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
