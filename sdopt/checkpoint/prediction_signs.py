"""What a UNet predicts, as far as its files say so: every sign is collected, and two that differ are an error.

Trainers write it under many names: `modelspec.prediction_type` and `modelspec.predict_key` (Stability's model spec),
`prediction_type`, `ss_v_parameterization` (kohya's sd-scripts, "True"), empty tensors named `v_pred` and `ztsnr`
(ComfyUI), `parameterization` in a YAML file beside the checkpoint (CompVis). A picture by the wrong one is noise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdopt.errors import CheckpointError
from sdopt.model.family import Family, Prediction, parse_prediction

_V_TENSORS = ("v_pred",)
_ZERO_SNR_TENSORS = ("ztsnr",)
_EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# The last part of a metadata key, behind modelspec. or ss_.
_VALUE_KEYS = frozenset({"prediction_type", "predict_key", "parameterization", "prediction", "pred_type"})
_V_FLAG_KEYS = frozenset({"v_parameterization", "v_pred", "v_prediction", "vpred"})
_ZERO_SNR_KEYS = frozenset({"zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr", "zsnr"})
_YAML_LIMIT_BYTES = 1 << 20
_YAML_LINE = re.compile(r"^[ \t]*parameterization[ \t]*:[ \t]*([^#\n]+)", re.MULTILINE)


@dataclass(frozen=True)
class Sign:
    """`place` is where it was found, as a phrase: "the tensor 'v_pred'"."""

    prediction: Prediction
    place: str


def find_signs(names: Collection[str], metadata: Mapping[str, str], file: Path) -> list[Sign]:
    """Every sign of a single file: its tensors' names, its metadata, and the YAML file beside it.

    Raises `CheckpointError` for a word that names another prediction, and for models of the EDM kind.
    """
    refuse_edm(names, str(file))
    signs = [Sign(Prediction.V_PREDICTION, f"the tensor {name!r}") for name in _V_TENSORS if name in names]
    for key, value in metadata.items():
        place = f"the metadata {key}={value.strip()[:40]!r}"
        if (last := _last_part(key)) in _VALUE_KEYS and value.strip().strip("\"'"):
            signs.append(Sign(_require_known(value, place, str(file)), place))
        elif last in _V_FLAG_KEYS and _is_yes(value):
            signs.append(Sign(Prediction.V_PREDICTION, place))
    for suffix in (".yaml", ".yml"):
        beside = file.with_suffix(suffix)
        if said := _read_yaml(beside):
            place = f"{beside.name} (parameterization: {said[:40]})"
            signs.append(Sign(_require_known(said, place, str(file)), place))
    return signs


def settle_prediction(signs: Collection[Sign], chosen: Prediction | None, where: str) -> Prediction | None:
    """The one prediction that all signs say, or the user's own choice, which needs none. None without a sign.

    Raises `CheckpointError` that names two signs which differ.
    """
    if chosen is not None:
        return chosen
    by_prediction = {sign.prediction: sign.place for sign in reversed(list(signs))}
    if len(by_prediction) > 1:
        (first, place), (second, other) = by_prediction.items()
        raise CheckpointError(
            f"{where} says two things of what its UNet predicts: {place} means {first}, and {other} means {second}",
            hint="--prediction epsilon or --prediction v_prediction decides; the wrong one draws noise",
        )
    return next(iter(by_prediction), None)


def usual_prediction(family: Family) -> Prediction | None:
    """What models of a family predict that say nothing; None for SD 2.x, which was published both ways."""
    return None if family is Family.SD2 else Prediction.EPSILON


def has_zero_snr(names: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file says that its noise schedule ends in pure noise."""
    said = any(_last_part(key) in _ZERO_SNR_KEYS and _is_yes(value) for key, value in metadata.items())
    return said or any(name in names for name in _ZERO_SNR_TENSORS)


def refuse_edm(names: Collection[str], where: str) -> None:
    if any(sign in names for sign in _EDM_TENSORS):
        raise CheckpointError(
            f"{where} was trained with EDM's noise levels, which sdopt does not know",
            hint="sdopt reads models that predict epsilon or v",
        )


def _require_known(said: str, place: str, where: str) -> Prediction:
    found = parse_prediction(said)
    if found is None:
        raise CheckpointError(
            f"{where}: {place} names a prediction that sdopt does not know",
            hint="sdopt knows epsilon and v_prediction; where the file is wrong, --prediction decides",
        )
    return found


def _last_part(key: str) -> str:
    return key.lower().rpartition(".")[2].removeprefix("ss_").replace("-", "_")


def _is_yes(value: str) -> bool:
    return value.strip().strip("\"'").lower() in ("true", "1", "yes", "on")


def _read_yaml(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_YAML_LIMIT_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    found = _YAML_LINE.search(text)
    return found[1].strip().strip("\"'") if found else ""
