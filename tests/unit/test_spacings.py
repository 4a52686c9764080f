"""Samplers against the formulas of k-diffusion and A1111, written out here in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from sdopt.errors import UsageError
from sdopt.model.family import Family, Prediction
from sdopt.model.samplers import SAMPLERS, SCHEDULERS, SchedulerName, Spacing, parse_a1111, parse_scheduler
from sdopt.pictures.infotext import parse_infotext
from sdopt.pipeline.schedulers import eta_of, label_of, make_scheduler
from sdopt.pipeline.spacings import space_levels

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SPACED = [name for name in SAMPLERS if f"{name}_karras" in list(SchedulerName)]
# Stable Diffusion's levels: the least, the largest, and how many.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)
TRAINED = ((1 - ALPHAS) / ALPHAS) ** 0.5


def make(name: str, config: dict[str, Any] | None = None, family: Family = Family.SD1) -> Any:
    return make_scheduler(name, config or {}, family=family, prediction=Prediction.EPSILON)


def log_between(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def level_at(timestep: float) -> float:
    whole = min(int(timestep), 998)
    return log_between(TRAINED[whole], TRAINED[whole + 1], timestep - whole)


LEAST, MOST = 0.029167, 14.614642
BY_HAND: dict[Spacing, list[float]] = {
    Spacing.UNIFORM: [level_at(999), level_at(749.25), level_at(499.5), level_at(249.75), level_at(0)],
    Spacing.SGM_UNIFORM: [level_at(999 * (1 - i / 5)) for i in range(5)],
    Spacing.SIMPLE: [float(TRAINED[999 - 200 * i]) for i in range(5)],
    Spacing.KARRAS: [
        (MOST ** (1 / 7) + i / 4 * (LEAST ** (1 / 7) - MOST ** (1 / 7))) ** 7 for i in range(5)
    ],
    Spacing.EXPONENTIAL: [MOST * (LEAST / MOST) ** (i / 4) for i in range(5)],
    Spacing.BETA: [LEAST + float(scipy.stats.beta.ppf(1 - i / 4, 0.6, 0.6)) * (MOST - LEAST) for i in range(5)],
}  # fmt: skip


@pytest.mark.parametrize("spacing", Spacing)
def test_levels_are_those_of_the_formula(spacing: Spacing) -> None:
    np.testing.assert_allclose(space_levels(TRAINED, spacing, 5), BY_HAND[spacing], rtol=1e-4)


@pytest.mark.parametrize("family", [Family.SD1, Family.SDXL])
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("name", SPACED)
def test_a_scheduler_takes_exactly_these_levels(name: SchedulerName, spacing: Spacing, family: Family) -> None:
    """Also where the checkpoint's own spacing does not begin at pure noise, as SDXL's."""
    scheduler = make(f"{name}_{spacing}", {"timestep_spacing": "leading"}, family)
    scheduler.set_timesteps(4)
    unique = torch.unique_consecutive(scheduler.sigmas)
    expected = BY_HAND[spacing][:4] if SCHEDULERS[name].drops_last_level else space_levels(TRAINED, spacing, 4)
    np.testing.assert_allclose(unique, [*expected, 0.0], rtol=2e-4)
    turns = scheduler.timesteps[0::2] if scheduler.order == 2 else scheduler.timesteps
    np.testing.assert_allclose([level_at(float(t)) for t in turns], expected, rtol=2e-4)
    assert float(scheduler.init_noise_sigma) in (1.0, pytest.approx(14.6146, rel=1e-4))


def network(scaled: torch.Tensor, timestep: float) -> torch.Tensor:
    """Noise predicted from a sample of variance 1: bent, and another at every timestep."""
    return torch.tanh(scaled * 1.3) * (0.5 + timestep / 1500)


def denoise(x: torch.Tensor, level: float) -> torch.Tensor:
    timestep = float(np.interp(math.log(level), np.log(TRAINED), np.arange(1000)))
    return x - level * network(x / math.sqrt(level**2 + 1), timestep)


NOISE = torch.tensor([0.4, -0.9, 1.7])


def ancestral(level: float, after: float) -> tuple[float, float]:
    up = math.sqrt(after**2 * (level**2 - after**2) / level**2)
    return math.sqrt(after**2 - up**2), up


def euler(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    for level, after in pairwise(levels):
        x = x + (x - denoise(x, level)) / level * (after - level)
    return x


def euler_a(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    for level, after in pairwise(levels):
        down, up = ancestral(level, after)
        x = x + (x - denoise(x, level)) / level * (down - level) + NOISE * up
    return x


def heun(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    for level, after in pairwise(levels):
        slope = (x - denoise(x, level)) / level
        ahead = x + slope * (after - level)
        if after:
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
        x = x + slope * (after - level)
    return x


def lms(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    slopes: list[torch.Tensor] = []
    for i, (level, after) in enumerate(pairwise(levels)):
        slopes = [*slopes, (x - denoise(x, level)) / level][-4:]
        used = levels[i - len(slopes) + 1 : i + 1]
        for j, slope in enumerate(slopes):
            others = [each for k, each in enumerate(used) if k != j]
            curve = np.poly1d(np.poly(others) if others else [1.0]) / np.prod([used[j] - each for each in others])
            x = x + float(np.polyval(np.polyint(curve), after) - np.polyval(np.polyint(curve), level)) * slope
    return x


def dpm_2(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    for level, after in pairwise(levels):
        slope = (x - denoise(x, level)) / level
        if after:
            middle = math.sqrt(level * after)
            ahead = x + slope * (middle - level)
            slope = (ahead - denoise(ahead, middle)) / middle
        x = x + slope * (after - level)
    return x


def dpm_2_a(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    for level, after in pairwise(levels):
        slope = (x - denoise(x, level)) / level
        down, up = ancestral(level, after)
        if down:
            middle = math.sqrt(level * down)
            ahead = x + slope * (middle - level)
            slope = (ahead - denoise(ahead, middle)) / middle
        x = x + slope * (down - level) + NOISE * up
    return x


def dpmpp_2m(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    before, last = None, 0.0
    for level, after in pairwise(levels):
        clean = denoise(x, level)
        if not after:
            return clean
        gap = math.log(level / after)
        used = clean if before is None else (1 + gap / last / 2) * clean - gap / last / 2 * before
        x, before, last = after / level * x - math.expm1(-gap) * used, clean, gap
    return x


def dpmpp_2m_sde(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    before, last = None, 0.0
    for level, after in pairwise(levels):
        clean = denoise(x, level)
        if not after:
            return clean
        gap = math.log(level / after)
        x = after / level * math.exp(-gap) * x - math.expm1(-2 * gap) * clean
        if before is not None:
            x = x - 0.5 * math.expm1(-2 * gap) * gap / last * (clean - before)
        x = x + NOISE * after * math.sqrt(-math.expm1(-2 * gap))
        before, last = clean, gap
    return x


def dpmpp_3m_sde(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    cleans: list[torch.Tensor] = []
    gaps: list[float] = []
    for level, after in pairwise(levels):
        clean = denoise(x, level)
        if not after:
            return clean
        gap = math.log(level / after)
        x = math.exp(-2 * gap) * x - math.expm1(-2 * gap) * clean
        phi_2 = math.expm1(-2 * gap) / (2 * gap) + 1
        phi_3 = phi_2 / (2 * gap) - 0.5
        if len(cleans) > 1:
            r0, r1 = gaps[-1] / gap, gaps[-2] / gap
            first, second = (clean - cleans[-1]) / r0, (cleans[-1] - cleans[-2]) / r1
            x = x + phi_2 * (first + (first - second) * r0 / (r0 + r1)) - phi_3 * (first - second) / (r0 + r1)
        elif cleans:
            x = x + phi_2 * (clean - cleans[-1]) / (gaps[-1] / gap)
        x = x + NOISE * after * math.sqrt(-math.expm1(-2 * gap))
        cleans, gaps = [*cleans, clean], [*gaps, gap]
    return x


K_DIFFUSION: dict[str, Callable[[torch.Tensor, list[float]], torch.Tensor]] = {
    "euler": euler, "euler_a": euler_a, "heun": heun, "lms": lms, "kdpm2": dpm_2, "kdpm2_a": dpm_2_a,
    "dpm++2m": dpmpp_2m, "dpm++2m_sde": dpmpp_2m_sde, "dpm++3m_sde": dpmpp_3m_sde,
}  # fmt: skip


def draw(scheduler: Any, steps: int, start: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """As a pipeline of diffusers does, with the same noise in every step."""
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: NOISE.reshape(1, 1, 1, 3))
    scheduler.set_timesteps(steps)
    sample = start
    for timestep in scheduler.timesteps:
        predicted = network(scheduler.scale_model_input(sample, timestep), float(timestep))
        sample = scheduler.step(predicted, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("name", SPACED)
def test_a_drawing_is_that_of_k_diffusion(
    name: SchedulerName, spacing: Spacing, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SCHEDULERS[name]
    levels = [*map(float, space_levels(TRAINED, spacing, steps + entry.drops_last_level)[:steps]), 0.0]
    begin = torch.tensor([1.1, -0.3, 0.6]).reshape(1, 1, 1, 3) * levels[0]
    expected = K_DIFFUSION[name](begin, levels)
    scaled = begin / math.sqrt(levels[0] ** 2 + 1) if entry.diffusers_class.startswith("DPM") else begin
    drawn = draw(make(f"{name}_{spacing}"), steps, scaled, monkeypatch)
    torch.testing.assert_close(drawn, expected, rtol=2e-3, atol=2e-3)


def test_planted_the_third_order_of_diffusers_is_another_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is corrected is seen by the test above: without it, the drawing is far off."""
    from sdopt.pipeline import schedulers

    monkeypatch.setattr(schedulers, "with_third_order", lambda kind: kind)
    levels = [*map(float, space_levels(TRAINED, Spacing.KARRAS, 21)[:20]), 0.0]
    begin = torch.tensor([1.1, -0.3, 0.6]).reshape(1, 1, 1, 3) * levels[0]
    drawn = draw(make("dpm++3m_sde_karras"), 20, begin / math.sqrt(levels[0] ** 2 + 1), monkeypatch)
    assert (drawn - dpmpp_3m_sde(begin, levels)).abs().max() > 0.02


@pytest.mark.parametrize("name", [f"{name}_{spacing}" for name in ("euler", "heun", "kdpm2") for spacing in Spacing])
def test_a_copy_by_its_config_has_the_same_levels(name: str) -> None:
    scheduler = make(name)
    again = type(scheduler).from_config(scheduler.config)
    for each in (scheduler, again):
        each.set_timesteps(7)
    assert torch.equal(scheduler.sigmas, again.sigmas)
    assert torch.equal(scheduler.timesteps, again.timesteps)
    assert label_of(again) == SCHEDULERS[SchedulerName(name)].label


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M", "Karras", "dpm++2m_karras"),
        ("DPM++ 2M Karras", "", "dpm++2m_karras"),
        ("DPM++ 2M", "Automatic", "dpm++2m_karras"),
        ("DPM++ 2M", "", "dpm++2m_uniform"),
        ("DPM++ 2M SDE", "Automatic", "dpm++2m_sde_exponential"),
        ("DPM++ 3M SDE Exponential", "", "dpm++3m_sde_exponential"),
        ("DPM++ 3M SDE", "Karras", "dpm++3m_sde_karras"),
        ("Euler a", "Automatic", "euler_a_uniform"),
        ("Euler", "SGM Uniform", "euler_sgm_uniform"),
        ("DPM2 a", "Automatic", "kdpm2_a_karras"),
        ("Heun", "Beta", "heun_beta"),
        ("LMS", "Simple", "lms_simple"),
        ("DDIM", "Karras", "ddim"),
        ("LCM", "Automatic", "lcm"),
        ("TCD", "", "tcd"),
    ],
)
def test_pictures_of_a1111_name_what_it_drew(sampler: str, schedule: str, expected: str) -> None:
    assert parse_a1111(sampler, schedule) == expected


@pytest.mark.parametrize(
    ("sampler", "schedule", "nearest"),
    [
        ("DPM++ SDE", "Karras", "dpm++2m_sde_karras"),
        ("DPM++ SDE Karras", "", "dpm++2m_sde_karras"),
        ("Restart", "Automatic", "heun"),
        ("DPM++ 2S a Karras", "", "euler_a_karras"),
        ("DPM adaptive", "", "dpm++2m"),
        ("UniPC", "Automatic", "unipc"),
    ],
)
def test_a_sampler_that_would_be_another_is_refused_with_the_nearest(sampler: str, schedule: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="there is no scheduler") as caught:
        parse_a1111(sampler, schedule)
    assert caught.value.hint == f"the nearest draws another picture: --scheduler {nearest}"
    parse_scheduler(nearest)


@pytest.mark.parametrize("schedule", ["Polyexponential", "KL Optimal", "Align Your Steps", "Karras"])
def test_a_spacing_that_a_sampler_has_not_is_refused(schedule: str) -> None:
    for sampler in ("LCM", "TCD") if schedule == "Karras" else ("Euler",):
        with pytest.raises(UsageError, match="there is no scheduler"):
            parse_a1111(sampler, schedule)


def test_a_picture_whose_sampler_is_refused_is_drawn_with_another_that_is_given() -> None:
    text = "x\nSteps: 20, Sampler: Restart, CFG scale: 7, Seed: 1"
    with pytest.raises(UsageError, match="no scheduler 'Restart'"):
        parse_infotext(text)
    assert parse_infotext(text, scheduler="heun").scheduler == "heun"


def test_the_randomness_of_tcd_is_that_of_its_paper() -> None:
    """Pipelines of diffusers hand on 0 unless they are told, with which TCD never adds noise."""
    assert eta_of(make("tcd")) == 0.3
    assert eta_of(make("ddim")) == 0.0
