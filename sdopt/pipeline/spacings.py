"""Noise levels as A1111 and k-diffusion spread them, in classes of diffusers.

The classes have spacings of their own, which differ: DPM++ 2M leaves out the last level and rounds timesteps to whole
numbers, and Karras' levels begin at the first of the checkpoint's timesteps instead of at pure noise.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdopt.model.samplers import Spacing

_Levels = npt.NDArray[np.float64]

# Of Karras et al. (arXiv 2206.00364), and of A1111's beta schedule.
_RHO = 7.0
_BETA_SHAPE = 0.6


def space_levels(trained: _Levels, spacing: Spacing, steps: int) -> _Levels:
    """The levels (sigmas) of `steps` steps, falling, without the zero at the end.

    `trained` are those of all timesteps of the checkpoint, rising.
    """
    last = len(trained) - 1
    least, most = float(trained[0]), float(trained[-1])
    match spacing:
        case Spacing.UNIFORM:
            return _levels_at(trained, np.linspace(last, 0, steps))
        case Spacing.SGM_UNIFORM:
            return _levels_at(trained, np.linspace(last, 0, steps + 1)[:-1])
        case Spacing.SIMPLE:
            return trained[[-1 - int(step * len(trained) / steps) for step in range(steps)]]
        case Spacing.KARRAS:
            roots = np.linspace(most ** (1 / _RHO), least ** (1 / _RHO), steps)
            return np.asarray(roots**_RHO)
        case Spacing.EXPONENTIAL:
            return np.exp(np.linspace(np.log(most), np.log(least), steps))
        case Spacing.BETA:
            from scipy.stats import beta

            shares = beta.ppf(1 - np.linspace(0, 1, steps), _BETA_SHAPE, _BETA_SHAPE)
            return np.asarray(least + shares * (most - least))


def timesteps_at(trained: _Levels, levels: _Levels) -> _Levels:
    """The timestep of each level, between two whole ones by the logarithm of the level."""
    return np.interp(np.log(levels), np.log(trained), np.arange(len(trained)))


def _levels_at(trained: _Levels, timesteps: _Levels) -> _Levels:
    return np.exp(np.interp(timesteps, np.arange(len(trained)), np.log(trained)))


@functools.cache
def with_spacing(kind: Any, spacing: Spacing, drops_last_level: bool) -> Any:
    """The class of diffusers with these levels. Calls that bring timesteps or levels of their own get theirs.

    It keeps its name, by which configs know it.
    """

    def levels_of(self: Any, steps: int) -> _Levels:
        return space_levels(_trained(self), spacing, steps + drops_last_level)[:steps]

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(kind.set_timesteps).bind(self, *args, **kwargs)
        steps = bound.arguments.get("num_inference_steps")
        if steps is None:
            kind.set_timesteps(self, *args, **kwargs)
            return
        levels = levels_of(self, steps)
        timesteps = torch.from_numpy(timesteps_at(_trained(self), levels)).float()
        if kind.order == 1:
            kind.set_timesteps(self, *args, **kwargs)
            self.sigmas = torch.from_numpy(np.append(levels, 0.0)).float()
            self.timesteps = timesteps
            return
        own = self._internal_dict
        self._internal_dict = type(own)({**own, **_KARRAS_ALONE})
        try:
            kind.set_timesteps(self, *args, **kwargs)
        finally:
            self._internal_dict = own
        # The classes round some. The second turn of a step is at the next level for Heun, between the two for DPM2.
        turns = self.timesteps.float()
        turns[0::2] = timesteps
        if not hasattr(self, "sigmas_interpol"):
            turns[1::2] = timesteps[1:]
        self.timesteps = turns

    def convert_to_karras(self: Any, in_sigmas: Any, num_inference_steps: int) -> _Levels:
        """Where the classes of second order ask for levels, from which they derive more."""
        del in_sigmas
        return levels_of(self, num_inference_steps)

    members = {
        "set_timesteps": set_timesteps,
        "spacing": spacing,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    if kind.order > 1:
        members["_convert_to_karras"] = convert_to_karras
    return type(kind.__name__, (kind,), members)


_KARRAS_ALONE = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}


def _trained(scheduler: Any) -> _Levels:
    alphas = scheduler.alphas_cumprod.double().numpy()
    return np.asarray(((1 - alphas) / alphas) ** 0.5)


@functools.cache
def with_third_order(kind: Any) -> Any:
    """DPM-Solver of third order with noise, with the sign of its last term as in k-diffusion's `sample_dpmpp_3m_sde`.

    With diffusers 0.42's, the term is too small by a whole second difference of predictions.
    """

    def update(self: Any, model_output_list: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved: torch.Tensor = kind.multistep_dpm_solver_third_order_update(self, model_output_list, *args, **kwargs)
        sigmas = self.sigmas[self.step_index - 2 : self.step_index + 2]
        alpha, _ = self._sigma_to_alpha_sigma_t(sigmas[-1])
        gaps = -sigmas.log().diff()  # of the logarithms of the signal's share, oldest first
        r0, r1 = gaps[1] / gaps[2], gaps[0] / gaps[2]
        m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        moved += alpha * ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        return moved

    members = {
        "multistep_dpm_solver_third_order_update": update,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), members)
