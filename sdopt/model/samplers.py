"""The samplers by name: what `--scheduler` takes, the class of diffusers behind each, and its name in A1111.

A name is that of a sampler, whose steps are spread as the checkpoint's config says, or that of a sampler and a spacing,
whose noise levels are those of A1111's "Schedule type" to the last digit. Samplers of other programs that are not here
are refused with the nearest that is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sdopt.errors import UsageError
from sdopt.model.suggest import find_near


class Spacing(StrEnum):
    """How the noise levels of the steps are spread: A1111's "Schedule type"."""

    UNIFORM = "uniform"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    SGM_UNIFORM = "sgm_uniform"
    SIMPLE = "simple"
    BETA = "beta"

    @property
    def label(self) -> str:
        return "SGM Uniform" if self is Spacing.SGM_UNIFORM else self.value.capitalize()


class SchedulerName(StrEnum):
    """What `--scheduler` takes. Case, spaces, hyphens and underscores do not matter."""

    DDIM = "ddim"
    DDPM = "ddpm"
    PNDM = "pndm"
    UNIPC = "unipc"
    DEIS = "deis"
    LCM = "lcm"
    TCD = "tcd"
    EULER = "euler"
    EULER_UNIFORM = "euler_uniform"
    EULER_KARRAS = "euler_karras"
    EULER_EXPONENTIAL = "euler_exponential"
    EULER_SGM_UNIFORM = "euler_sgm_uniform"
    EULER_SIMPLE = "euler_simple"
    EULER_BETA = "euler_beta"
    EULER_A = "euler_a"
    EULER_A_UNIFORM = "euler_a_uniform"
    EULER_A_KARRAS = "euler_a_karras"
    EULER_A_EXPONENTIAL = "euler_a_exponential"
    EULER_A_SGM_UNIFORM = "euler_a_sgm_uniform"
    EULER_A_SIMPLE = "euler_a_simple"
    EULER_A_BETA = "euler_a_beta"
    HEUN = "heun"
    HEUN_UNIFORM = "heun_uniform"
    HEUN_KARRAS = "heun_karras"
    HEUN_EXPONENTIAL = "heun_exponential"
    HEUN_SGM_UNIFORM = "heun_sgm_uniform"
    HEUN_SIMPLE = "heun_simple"
    HEUN_BETA = "heun_beta"
    LMS = "lms"
    LMS_UNIFORM = "lms_uniform"
    LMS_KARRAS = "lms_karras"
    LMS_EXPONENTIAL = "lms_exponential"
    LMS_SGM_UNIFORM = "lms_sgm_uniform"
    LMS_SIMPLE = "lms_simple"
    LMS_BETA = "lms_beta"
    DPMPP_2M = "dpm++2m"
    DPMPP_2M_UNIFORM = "dpm++2m_uniform"
    DPMPP_2M_KARRAS = "dpm++2m_karras"
    DPMPP_2M_EXPONENTIAL = "dpm++2m_exponential"
    DPMPP_2M_SGM_UNIFORM = "dpm++2m_sgm_uniform"
    DPMPP_2M_SIMPLE = "dpm++2m_simple"
    DPMPP_2M_BETA = "dpm++2m_beta"
    DPMPP_2M_SDE = "dpm++2m_sde"
    DPMPP_2M_SDE_UNIFORM = "dpm++2m_sde_uniform"
    DPMPP_2M_SDE_KARRAS = "dpm++2m_sde_karras"
    DPMPP_2M_SDE_EXPONENTIAL = "dpm++2m_sde_exponential"
    DPMPP_2M_SDE_SGM_UNIFORM = "dpm++2m_sde_sgm_uniform"
    DPMPP_2M_SDE_SIMPLE = "dpm++2m_sde_simple"
    DPMPP_2M_SDE_BETA = "dpm++2m_sde_beta"
    DPMPP_3M_SDE = "dpm++3m_sde"
    DPMPP_3M_SDE_UNIFORM = "dpm++3m_sde_uniform"
    DPMPP_3M_SDE_KARRAS = "dpm++3m_sde_karras"
    DPMPP_3M_SDE_EXPONENTIAL = "dpm++3m_sde_exponential"
    DPMPP_3M_SDE_SGM_UNIFORM = "dpm++3m_sde_sgm_uniform"
    DPMPP_3M_SDE_SIMPLE = "dpm++3m_sde_simple"
    DPMPP_3M_SDE_BETA = "dpm++3m_sde_beta"
    KDPM2 = "kdpm2"
    KDPM2_UNIFORM = "kdpm2_uniform"
    KDPM2_KARRAS = "kdpm2_karras"
    KDPM2_EXPONENTIAL = "kdpm2_exponential"
    KDPM2_SGM_UNIFORM = "kdpm2_sgm_uniform"
    KDPM2_SIMPLE = "kdpm2_simple"
    KDPM2_BETA = "kdpm2_beta"
    KDPM2_A = "kdpm2_a"
    KDPM2_A_UNIFORM = "kdpm2_a_uniform"
    KDPM2_A_KARRAS = "kdpm2_a_karras"
    KDPM2_A_EXPONENTIAL = "kdpm2_a_exponential"
    KDPM2_A_SGM_UNIFORM = "kdpm2_a_sgm_uniform"
    KDPM2_A_SIMPLE = "kdpm2_a_simple"
    KDPM2_A_BETA = "kdpm2_a_beta"


@dataclass(frozen=True)
class SchedulerEntry:
    """A class of diffusers, the sampler's name in A1111's infotext, and settings that make the class this
    sampler.
    """

    diffusers_class: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    spacing: Spacing | None = None
    drops_last_level: bool = False
    """A1111 asks a spacing for one level more, and leaves out the last above zero."""
    eta: float = 0.0
    """How random a step is, of the classes whose `step` takes it."""


_SDE = {"algorithm_type": "sde-dpmsolver++"}
# The second step of k-diffusion's 3M SDE is what diffusers calls `heun`, and only the very last is of first order.
_SDE_3M = {**_SDE, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}

# Those that A1111 draws by a table of timesteps, or by levels of their own.
_UNSPACED: Mapping[SchedulerName, SchedulerEntry] = {
    SchedulerName.DDIM: SchedulerEntry("DDIMScheduler", "DDIM", {"set_alpha_to_one": False}),
    SchedulerName.DDPM: SchedulerEntry("DDPMScheduler", "DDPM"),
    SchedulerName.PNDM: SchedulerEntry("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    SchedulerName.UNIPC: SchedulerEntry("UniPCMultistepScheduler", "UniPC"),
    SchedulerName.DEIS: SchedulerEntry("DEISMultistepScheduler", "DEIS"),
    SchedulerName.LCM: SchedulerEntry("LCMScheduler", "LCM"),
    # 0.3 is the gamma of the paper and of its LoRAs (arXiv 2402.19159).
    SchedulerName.TCD: SchedulerEntry("TCDScheduler", "TCD", eta=0.3),
}
_SPACED: Mapping[SchedulerName, SchedulerEntry] = {
    SchedulerName.EULER: SchedulerEntry("EulerDiscreteScheduler", "Euler"),
    SchedulerName.EULER_A: SchedulerEntry("EulerAncestralDiscreteScheduler", "Euler a"),
    SchedulerName.HEUN: SchedulerEntry("HeunDiscreteScheduler", "Heun"),
    SchedulerName.LMS: SchedulerEntry("LMSDiscreteScheduler", "LMS"),
    SchedulerName.DPMPP_2M: SchedulerEntry("DPMSolverMultistepScheduler", "DPM++ 2M"),
    SchedulerName.DPMPP_2M_SDE: SchedulerEntry("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE),
    SchedulerName.DPMPP_3M_SDE: SchedulerEntry(
        "DPMSolverMultistepScheduler", "DPM++ 3M SDE", _SDE_3M, drops_last_level=True
    ),
    SchedulerName.KDPM2: SchedulerEntry("KDPM2DiscreteScheduler", "DPM2", drops_last_level=True),
    SchedulerName.KDPM2_A: SchedulerEntry("KDPM2AncestralDiscreteScheduler", "DPM2 a", drops_last_level=True),
}


# The setting of diffusers' classes that gives nearly these levels, so that a saved config means what it can.
_FLAGS: Mapping[Spacing, str] = {
    Spacing.KARRAS: "use_karras_sigmas", Spacing.EXPONENTIAL: "use_exponential_sigmas", Spacing.BETA: "use_beta_sigmas",
}  # fmt: skip


def _with_spacing(entry: SchedulerEntry, spacing: Spacing) -> SchedulerEntry:
    settings = {**entry.settings, **({_FLAGS[spacing]: True} if spacing in _FLAGS else {})}
    return replace(entry, label=f"{entry.label} {spacing.label}", settings=settings, spacing=spacing)


SCHEDULERS: Mapping[SchedulerName, SchedulerEntry] = {
    **_UNSPACED,
    **_SPACED,
    **{
        SchedulerName(f"{name}_{spacing}"): _with_spacing(entry, spacing)
        for name, entry in _SPACED.items()
        for spacing in Spacing
    },
}
SAMPLERS: tuple[SchedulerName, ...] = (*_UNSPACED, *_SPACED)
"""The names without a spacing."""

_BEHIND = f"; behind those from {SchedulerName.EULER} on also a spacing, as in euler_karras: {', '.join(Spacing)}"
NAMES_IN_WORDS = ", ".join(SAMPLERS) + _BEHIND

# Samplers of A1111 that pictures carry and that sdopt does not draw: what comes nearest, and why it is another.
_OTHERS: Mapping[str, tuple[SchedulerName, str]] = {
    "DPM++ SDE": (SchedulerName.DPMPP_2M_SDE, "it asks the network twice a step, with noise between"),
    "DPM++ 2S a": (SchedulerName.EULER_A, "it asks the network twice a step"),
    "DPM++ 2M SDE Heun": (SchedulerName.DPMPP_2M_SDE, "its second order has other weights"),
    "DPM fast": (SchedulerName.DPMPP_2M, "its order changes from step to step"),
    "DPM adaptive": (SchedulerName.DPMPP_2M, "it chooses its steps as it goes"),
    "Restart": (SchedulerName.HEUN, "it goes back to more noise and comes down again"),
    "DDIM CFG++": (SchedulerName.DDIM, "its noise is that of the negative prompt"),
}


def parse_scheduler(text: str) -> SchedulerName:
    """A scheduler by its name or by A1111's: `dpm++2m_karras`, `DPM++ 2M Karras`. Raises `UsageError` with
    the nearest.
    """
    known: dict[str, SchedulerName] = {}
    for name, entry in SCHEDULERS.items():
        known |= {_squeeze(name): name, _squeeze(entry.label): name}
    squeezed = _squeeze(text)
    if found := known.get(squeezed):
        return found
    for other, (nearest, reason) in _OTHERS.items():
        spacing = next((each for each in ("", *Spacing) if squeezed == _squeeze(other + each)), None)
        if spacing is not None:
            suffix = f"_{spacing}" if spacing and nearest in _SPACED else ""
            raise _another(text, reason, SchedulerName(f"{nearest}{suffix}"))
    plain = {word.replace("+", ""): name for word, name in known.items()}
    near = find_near(squeezed.replace("+", ""), plain)
    meant = "known: " if near is None else f"did you mean {plain[near].value!r}? Known: "
    raise UsageError(f"there is no scheduler {text!r}", hint=meant + NAMES_IN_WORDS)


def _another(text: str, reason: str, nearest: SchedulerName) -> UsageError:
    return UsageError(
        f"there is no scheduler {text!r}: {reason}",
        hint=f"the nearest draws another picture: --scheduler {nearest}",
    )


def parse_a1111(sampler: str, schedule: str) -> SchedulerName:
    """A picture's "Sampler" and "Schedule type" as the noise levels that A1111 took, which "Automatic" leaves to the
    sampler. Without a schedule, as before A1111 1.9, they were uniform where the sampler's name said nothing.

    Raises `UsageError` for what sdopt does not draw.
    """
    if _squeeze(sampler) == "unipc":
        raise _another(sampler, "A1111's is of third order, sdopt's of second", SchedulerName.UNIPC)
    if schedule in ("", "Automatic"):
        name = parse_scheduler(sampler)
        if name not in _SPACED:
            return name
        spacing = _AUTOMATIC.get(name, Spacing.UNIFORM) if schedule else Spacing.UNIFORM
        return SchedulerName(f"{name}_{spacing}")
    if _squeeze(sampler) in _IGNORES_SCHEDULE:
        return parse_scheduler(sampler)
    return parse_scheduler(f"{sampler} {schedule}")


# Of A1111 1.9 and later.
_AUTOMATIC: Mapping[SchedulerName, Spacing] = {
    SchedulerName.DPMPP_2M: Spacing.KARRAS, SchedulerName.KDPM2: Spacing.KARRAS, SchedulerName.KDPM2_A: Spacing.KARRAS,
    SchedulerName.DPMPP_2M_SDE: Spacing.EXPONENTIAL, SchedulerName.DPMPP_3M_SDE: Spacing.EXPONENTIAL,
}  # fmt: skip
# A1111 writes a schedule beside these, and draws them by their own timesteps.
_IGNORES_SCHEDULE = frozenset({"ddim", "plms"})


def _squeeze(text: str) -> str:
    return re.sub(r"[\s_\-]+", "", text.lower())
