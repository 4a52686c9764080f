"""The samplers by name: what `--scheduler` takes, the class of diffusers behind each, and its name in A1111."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sdopt.errors import UsageError
from sdopt.model.suggest import find_near, suggest


class SchedulerName(StrEnum):
    """What `--scheduler` takes. Case, spaces, hyphens and underscores do not matter."""

    DDIM = "ddim"
    DDPM = "ddpm"
    PNDM = "pndm"
    LMS = "lms"
    EULER = "euler"
    EULER_A = "euler_a"
    HEUN = "heun"
    DPMPP_2M = "dpm++2m"
    DPMPP_2M_KARRAS = "dpm++2m_karras"
    DPMPP_2M_SDE = "dpm++2m_sde"
    DPMPP_2M_SDE_KARRAS = "dpm++2m_sde_karras"
    KDPM2 = "kdpm2"
    KDPM2_A = "kdpm2_a"
    UNIPC = "unipc"
    DEIS = "deis"
    LCM = "lcm"


@dataclass(frozen=True)
class SchedulerEntry:
    """A class of diffusers, the sampler's name in A1111's infotext, and settings that make the class this
    sampler.
    """

    diffusers_class: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SCHEDULERS: Mapping[SchedulerName, SchedulerEntry] = {
    SchedulerName.DDIM: SchedulerEntry("DDIMScheduler", "DDIM", {"set_alpha_to_one": False}),
    SchedulerName.DDPM: SchedulerEntry("DDPMScheduler", "DDPM"),
    SchedulerName.PNDM: SchedulerEntry("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    SchedulerName.LMS: SchedulerEntry("LMSDiscreteScheduler", "LMS"),
    SchedulerName.EULER: SchedulerEntry("EulerDiscreteScheduler", "Euler"),
    SchedulerName.EULER_A: SchedulerEntry("EulerAncestralDiscreteScheduler", "Euler a"),
    SchedulerName.HEUN: SchedulerEntry("HeunDiscreteScheduler", "Heun"),
    SchedulerName.DPMPP_2M: SchedulerEntry("DPMSolverMultistepScheduler", "DPM++ 2M"),
    SchedulerName.DPMPP_2M_KARRAS: SchedulerEntry("DPMSolverMultistepScheduler", "DPM++ 2M Karras", _KARRAS),
    SchedulerName.DPMPP_2M_SDE: SchedulerEntry("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE),
    SchedulerName.DPMPP_2M_SDE_KARRAS: SchedulerEntry(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", _SDE | _KARRAS
    ),
    SchedulerName.KDPM2: SchedulerEntry("KDPM2DiscreteScheduler", "DPM2"),
    SchedulerName.KDPM2_A: SchedulerEntry("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    SchedulerName.UNIPC: SchedulerEntry("UniPCMultistepScheduler", "UniPC"),
    SchedulerName.DEIS: SchedulerEntry("DEISMultistepScheduler", "DEIS"),
    SchedulerName.LCM: SchedulerEntry("LCMScheduler", "LCM"),
}


def parse_scheduler(text: str) -> SchedulerName:
    """A scheduler by its name or by A1111's: `dpm++2m_karras`, `DPM++ 2M Karras`. Raises `UsageError` with
    the nearest.
    """
    known: dict[str, SchedulerName] = {}
    for name, entry in SCHEDULERS.items():
        known |= {_squeeze(name): name, _squeeze(entry.label): name}
    if found := known.get(_squeeze(text)):
        return found
    near = find_near(_squeeze(text), known)
    meant = text if near is None else known[near].value
    raise UsageError(f"there is no scheduler {text!r}", hint=suggest(meant, SchedulerName))


def _squeeze(text: str) -> str:
    return re.sub(r"[\s_\-]+", "", text.lower())
