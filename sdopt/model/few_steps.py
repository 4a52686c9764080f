"""What models that draw in one to eight steps are drawn with, as their makers say, found by what files are called.

Only published names count. A checkpoint that somebody merged and called "turbo" may want anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sdopt.model.samplers import SchedulerName

FIELDS = ("scheduler", "steps", "guidance_scale")
"""The fields of a request that a proposal has."""


@dataclass(frozen=True)
class Proposal:
    """`source` is the file or model whose name says it, and `kind` what it is."""

    kind: str
    source: str
    scheduler: SchedulerName
    steps: int
    guidance_scale: float


def propose(name: str) -> Proposal | None:
    """For a LoRA or checkpoint by its name, without a folder and an ending; None where nothing is known of it."""
    word = re.sub(r"[\s_.\-]+", "-", name.lower())
    for pattern, make in _PUBLISHED:
        if match := pattern.search(word):
            return make(name, match)
    return None


def propose_for_guidance_input(name: str) -> Proposal:
    """For a UNet that takes the guidance scale as an input, as LCM's own checkpoints do (arXiv 2310.04378)."""
    return Proposal("LCM", name, SchedulerName.LCM, 4, 8.0)


def _lcm(name: str, match: re.Match[str]) -> Proposal:
    del match
    return Proposal("LCM", name, SchedulerName.LCM, 4, 1.0)


def _tcd(name: str, match: re.Match[str]) -> Proposal:
    del match
    return Proposal("TCD", name, SchedulerName.TCD, 4, 1.0)


def _turbo(name: str, match: re.Match[str]) -> Proposal:
    del match
    return Proposal("Turbo", name, SchedulerName.EULER_A_SGM_UNIFORM, 1, 1.0)


def _lightning(name: str, match: re.Match[str]) -> Proposal:
    return Proposal("Lightning", name, SchedulerName.EULER_SGM_UNIFORM, int(match[1]), 1.0)


def _hyper(name: str, match: re.Match[str]) -> Proposal:
    steps = int(match[1])
    if steps == 1:  # the LoRA for one to eight steps
        return Proposal("Hyper-SD", name, SchedulerName.TCD, 4, 1.0)
    # DDIM with trailing steps, which is Euler on the same levels. Those with CFG are made for a scale of 5 to 8.
    return Proposal("Hyper-SD", name, SchedulerName.EULER_SGM_UNIFORM, steps, 5.0 if match[2] else 1.0)


def _dmd2(name: str, match: re.Match[str]) -> Proposal:
    del match
    return Proposal("DMD2", name, SchedulerName.LCM, 4, 1.0)


# latent-consistency/lcm-lora-*, h1t/TCD-*, stabilityai/sd-turbo and sdxl-turbo, ByteDance/SDXL-Lightning,
# ByteDance/Hyper-SD, tianweiy/DMD2. Lightning's model for one step predicts the picture, which is another UNet.
_PUBLISHED: tuple[tuple[re.Pattern[str], Callable[[str, re.Match[str]], Proposal]], ...] = (
    (re.compile(r"(?<![a-z])lcm-?lora(?![a-z])"), _lcm),
    (re.compile(r"(?<![a-z])tcd-(?:sd|animatelcm|lora)"), _tcd),
    (re.compile(r"^sd-?(?:xl)?-?turbo(?:-1-0)?(?:-fp16)?(?:-lora.*)?$"), _turbo),
    (re.compile(r"^sdxl-lightning-([248])step"), _lightning),
    (re.compile(r"^hyper-sd(?:15|xl)-(\d+)-?steps?(-cfg)?"), _hyper),
    (re.compile(r"^dmd2-sdxl-4step"), _dmd2),
)
