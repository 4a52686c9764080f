"""Schedulers of diffusers with the settings that a checkpoint needs, and how many steps each can do.

A checkpoint's noise schedule and prediction type belong to its weights and are always kept; how steps are spaced is a
choice of the sampler.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdopt.errors import ArtifactError, UsageError
from sdopt.model.family import Family, Prediction
from sdopt.model.samplers import SAMPLERS, SCHEDULERS, SchedulerEntry, SchedulerName, Spacing, parse_scheduler
from sdopt.pipeline.spacings import with_spacing, with_third_order

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


# What the weights were trained with. Everything else in a scheduler's config belongs to the sampler that
# wrote it.
_OF_THE_CHECKPOINT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)

# The published configs: stable-diffusion-v1-5 and SDXL-base-1.0, scheduler/scheduler_config.json.
_PUBLISHED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def make_scheduler(
    name: SchedulerName | str | None,
    base_config: Mapping[str, Any],
    *,
    family: Family,
    prediction: Prediction,
) -> SchedulerMixin:
    """A scheduler for a checkpoint whose own scheduler has `base_config`; None makes the checkpoint's own.

    Keeps the noise schedule (betas, zero terminal SNR) and takes `prediction`. Raises `UsageError` where the
    named scheduler cannot follow that schedule, and `ArtifactError` where the checkpoint's own is not one of
    diffusers.
    """
    if name is None:
        return _make_own(base_config, family, prediction)
    name = parse_scheduler(name)
    entry = SCHEDULERS[name]
    kind = _diffusers_class(entry.diffusers_class, entry)
    accepted = inspect.signature(kind.__init__).parameters
    zero_snr = bool(base_config.get("rescale_betas_zero_snr"))
    if zero_snr:
        _refuse_zero_snr(name, entry, accepted)
    config = _PUBLISHED | {key: base_config[key] for key in _OF_THE_CHECKPOINT if key in base_config}
    config |= _spacing(base_config, family, zero_snr) if entry.spacing is None else _named_spacing(entry.spacing)
    # Latents are not bounded, so nothing may be clipped to [-1, 1] as in the pixel models that diffusers
    # began with.
    config |= {"prediction_type": prediction.value, "clip_sample": False, **entry.settings}
    return kind(**{key: value for key, value in config.items() if key in accepted})


def _spacing(base_config: Mapping[str, Any], family: Family, zero_snr: bool) -> dict[str, Any]:
    """How steps are spread. Without an entry, each class of diffusers takes its own default."""
    offset = {"steps_offset": int(base_config.get("steps_offset", 1)) if family.is_xl else 1}
    if zero_snr:
        # Only trailing steps begin at pure noise, which is what such a model has to see first (arXiv
        # 2305.08891).
        return offset | {"timestep_spacing": "trailing"}
    if "timestep_spacing" in base_config:
        return offset | {"timestep_spacing": base_config["timestep_spacing"]}
    return offset | ({"timestep_spacing": "leading"} if family.is_xl else {})


def _named_spacing(spacing: Spacing) -> dict[str, Any]:
    """What classes of diffusers have that comes nearest, and with which they begin at the first level."""
    return {"steps_offset": 1, "timestep_spacing": "trailing" if spacing is Spacing.SGM_UNIFORM else "linspace"}


def _refuse_zero_snr(name: SchedulerName, entry: SchedulerEntry, accepted: Mapping[str, object]) -> None:
    if "rescale_betas_zero_snr" not in accepted:
        reason = f"{entry.diffusers_class} cannot represent a last step without any signal"
    elif entry.spacing not in (None, Spacing.SGM_UNIFORM):
        reason = "its spacing would spend steps above a sigma of 50, where there is only noise"
    else:
        return
    fit = [each for each in SAMPLERS if "rescale_betas_zero_snr" in _settings_of(SCHEDULERS[each].diffusers_class)]
    raise UsageError(
        f"{name.value!r} does not fit this checkpoint, which was trained to zero terminal SNR: {reason}",
        hint=f"these fit: {', '.join(fit)}",
    )


def _settings_of(diffusers_class: str) -> Mapping[str, object]:
    return inspect.signature(_diffusers_class(diffusers_class).__init__).parameters


def _make_own(base_config: Mapping[str, Any], family: Family, prediction: Prediction) -> SchedulerMixin:
    kind = _diffusers_class(str(base_config.get("_class_name", "")))
    accepted = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in base_config.items() if key in accepted} | {
        "prediction_type": prediction.value
    }
    if not family.is_xl:
        # StableDiffusionPipeline would set these two itself, with a warning that the user can do nothing
        # about.
        config |= {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}
    return kind(**{key: value for key, value in config.items() if key in accepted})


def label_of(scheduler: SchedulerMixin) -> str:
    """A1111's name of a scheduler; the name of its class where A1111 has none."""
    kind, config = type(scheduler).__name__, scheduler.config
    spacing = getattr(scheduler, "spacing", None)
    # A class can be several samplers: the one with the most settings in common is meant.
    matches = [
        entry
        for entry in SCHEDULERS.values()
        if entry.diffusers_class == kind
        and (entry.spacing is spacing or (spacing is None and _is_in_config(entry, config)))
        and all(config.get(key, v) == v for key, v in entry.settings.items())
    ]
    return max(matches, key=lambda entry: len(entry.settings)).label if matches else kind


def _is_in_config(entry: SchedulerEntry, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of diffusers' own spacing has the entry's in its settings, as a checkpoint's may."""
    return any(key.endswith("_sigmas") and config.get(key) for key in entry.settings)


def eta_of(scheduler: SchedulerMixin) -> float:
    """The randomness of its steps. Pipelines of diffusers hand it on, and 0 where they are not told."""
    kind = type(scheduler).__name__
    return max((entry.eta for entry in SCHEDULERS.values() if entry.diffusers_class == kind), default=0.0)


def _diffusers_class(name: str, entry: SchedulerEntry | None = None) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ArtifactError(
            f"the bundle's scheduler {name!r} is not one that diffusers {diffusers.__version__} has",
            hint="choose one with --scheduler",
        )
    if entry is not None and entry.settings.get("solver_order") == 3:
        kind = with_third_order(kind)
    if entry is not None and entry.spacing is not None:
        kind = with_spacing(kind, entry.spacing, entry.drops_last_level)
    return _with_host_timesteps(kind)


@functools.cache
def _with_host_timesteps(kind: Any) -> Any:
    """The class with its timesteps on the CPU, wherever the latents are, for one drawing at a time.

    It keeps its name, by which configs know it. A drawing whose steps another thread has reset is refused: it would go
    on with the other's noise levels, and give a wrong picture.

    DDIM, DDPM, PNDM and LCM look each timestep up in a table on the CPU: from a GPU, the host would wait in every step
    until the GPU has done all that it has. (Schedulers that add noise still wait, because a generator of the CPU makes
    it, and UniPC's small linear systems do.)
    """
    signature = inspect.signature(kind.set_timesteps)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["device"] = "cpu"
        self._drawing_thread = threading.get_ident()
        kind.set_timesteps(*bound.args, **bound.kwargs)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_drawing_thread", None) not in (None, threading.get_ident()):
            raise UsageError(
                "another thread began to draw with the same scheduler, which counts the steps of one drawing",
                hint="draw with the pipeline of sdopt.load, whose calls queue, or give each pipeline its own scheduler",
            )
        return kind.step(self, *args, **kwargs)

    members = {"set_timesteps": set_timesteps, "step": step, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)
