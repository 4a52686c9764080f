"""How many steps a scheduler can do, found by trying: its own timesteps and steps on a tensor of four numbers.

Classes of diffusers fail in different ways above their limit: an index behind the table of noise levels, two equal
levels whose difference something is divided by, a distilled schedule that is shorter. No table of limits could know
every noise schedule, spacing and version, so the scheduler itself is asked, with a model that predicts half of its
input.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from sdopt.errors import UsageError
from sdopt.model.samplers import SAMPLERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Just below the number asked for, each is tried; further down, the limit is searched by halves.
_TRIED_ONE_BY_ONE = 4


def require_steps(scheduler: SchedulerMixin, steps: object, *, name: str = "steps") -> None:
    """Refuse a number of steps that the scheduler cannot do, before any network runs.

    `name` is what the caller calls the number. Raises `UsageError` with the largest number that it can.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{name} is {steps!r}, and has to be a whole number from 1")
    reason = _try(scheduler, steps)
    if not reason:
        return
    label = type(scheduler).__name__
    most = _find_limit(scheduler, steps)
    if not most:
        raise UsageError(f"{label} cannot draw with this checkpoint's noise schedule: {reason}")
    raise UsageError(
        f"{name} is {steps}, and {label} can do {most} at most with this checkpoint's noise schedule: {reason}",
        hint=f"ask for {most} steps or fewer, or for another scheduler: {', '.join(SAMPLERS)}",
    )


def _find_limit(scheduler: SchedulerMixin, steps: int) -> int:
    """The largest number below `steps` that works; 0 where not even one does."""
    for fewer in range(steps - 1, max(0, steps - 1 - _TRIED_ONE_BY_ONE), -1):
        if not _try(scheduler, fewer):
            return fewer
    good, bad = 0, max(1, steps - _TRIED_ONE_BY_ONE)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if _try(scheduler, middle) else (middle, bad)
    return good


def _try(scheduler: SchedulerMixin, steps: int) -> str:
    config = json.dumps(dict(scheduler.config), sort_keys=True, default=list)
    kind: Any = type(scheduler)
    return _run(kind, config, steps)


@functools.lru_cache(maxsize=1024)
def _run(kind: Any, config: str, steps: int) -> str:
    """Why `steps` steps do not work, or nothing. Draws no numbers from the generator of the process."""
    scheduler = kind.from_config(json.loads(config))
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler.set_timesteps(steps)
            sample = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2) * float(scheduler.init_noise_sigma)
            for number, timestep in enumerate(scheduler.timesteps, 1):
                predicted = scheduler.scale_model_input(sample, timestep) / 2
                sample = scheduler.step(predicted, timestep, sample, **extra).prev_sample
                if not bool(sample.isfinite().all()):
                    return f"step {number} divides by zero"
        except (ValueError, IndexError, ArithmeticError, RuntimeError, AssertionError, TypeError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
    return ""
