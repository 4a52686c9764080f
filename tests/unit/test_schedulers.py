from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdopt.checkpoint.scheduler_class import SCHEDULER_CLASSES, require_known_scheduler
from sdopt.errors import ArtifactError, UsageError
from sdopt.model.family import Family, Prediction
from sdopt.model.request import TextToImage
from sdopt.model.samplers import SAMPLERS, SCHEDULERS, SchedulerName, parse_scheduler
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.pipeline.schedulers import label_of, make_scheduler
from sdopt.pipeline.step_limit import require_steps
from sdopt.tasks.draw import draw_picture
from tests.reference_session import TINY_SHAPES, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

# As published: stable-diffusion-v1-5 (PNDM), SDXL-base-1.0 (Euler), and a zero-SNR v-prediction model.
SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SDXL = {
    "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_start": 0.00085, "clip_sample": False,
    "beta_schedule": "scaled_linear", "interpolation_type": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
ZERO_SNR = SDXL | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FIT_ZERO_SNR = {
    "ddim", "ddpm", "euler", "euler_a", "dpm++2m", "dpm++2m_sde", "dpm++3m_sde", "unipc", "lcm", "tcd",
}  # fmt: skip
FIT_ZERO_SNR_SPACED = {f"{name}_sgm_uniform" for name in ("euler", "euler_a", "dpm++2m", "dpm++2m_sde", "dpm++3m_sde")}
# Each sampler once, and one spacing for each way in which a class takes its levels.
DRAWN = [*SAMPLERS, *map(SchedulerName, ("euler_a_karras", "dpm++2m_karras", "kdpm2_beta", "heun_sgm_uniform"))]


def make(name: Any, base: dict[str, Any] = SD15, family: Family = Family.SD1, **kwargs: Any) -> Any:
    return make_scheduler(name, base, family=family, prediction=kwargs.get("prediction", Prediction.EPSILON))


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    bundle = make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
    ours = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(TINY_SHAPES, dtype=torch.float32, safety_checker=None)
    for pipe in (ours, plain):
        pipe.set_progress_bar_config(disable=True)
    return ours, plain


def test_table_covers_every_name() -> None:
    assert set(SCHEDULERS) == set(SchedulerName)
    assert len(SCHEDULERS) >= 14
    assert len({entry.label for entry in SCHEDULERS.values()}) == len(SCHEDULERS)


def test_names_are_read_without_diffusers_or_torch() -> None:
    code = (
        "import sys; from sdopt.model.samplers import parse_scheduler; parse_scheduler('Euler a');"
        "import sdopt.tasks.draw, sdopt.cli.generate;"
        "assert not {'torch', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SchedulerName)
def test_names_and_labels_are_understood(name: SchedulerName) -> None:
    label = SCHEDULERS[name].label
    for text in (
        name.value,
        name.upper(),
        name.replace("_", " "),
        name.replace("_", "-"),
        label,
        label.lower(),
    ):
        assert parse_scheduler(text) is name


def squeezed(text: str) -> str:
    return "".join(text.lower().replace("_", "").replace("-", "").split())


@given(st.text(max_size=30) | st.sampled_from(SchedulerName).map(lambda name: f" {name}- "))
def test_any_other_name_is_a_usage_error(text: str) -> None:
    known = {squeezed(name) for name in SchedulerName} | {squeezed(e.label) for e in SCHEDULERS.values()}
    if squeezed(text) in known:
        assert parse_scheduler(text) in SchedulerName
        return
    with pytest.raises(UsageError) as caught:
        parse_scheduler(text)
    assert "known: ddim" in caught.value.hint


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="no scheduler 'dpm2m karas'") as caught:
        parse_scheduler("dpm2m karas")
    assert "did you mean 'dpm++2m_karras'" in caught.value.hint


@pytest.mark.parametrize("name", DRAWN)
def test_draws_the_colour_and_what_torch_draws(name: SchedulerName, pipes: tuple[Any, Any]) -> None:
    ours, plain = pipes
    # LCM and TCD need a distilled model; on this one they blur, yet have to blur as torch does.
    request = TextToImage(prompt="a large red circle on a blue background", seed=5, steps=20, scheduler=name)
    drawn = np.asarray(draw_picture(ours, request)).astype(float)
    plain.scheduler = make(name, json.loads((TINY_SHAPES / "scheduler" / "scheduler_config.json").read_text()))
    expected = np.asarray(draw_picture(plain, request.model_copy(update={"scheduler": None}))).astype(float)
    assert np.abs(drawn - expected).max() <= 1
    red, _green, blue = np.moveaxis(drawn, -1, 0)
    assert (blue > red + 60).mean() > 0.3
    if name not in (SchedulerName.LCM, SchedulerName.TCD):
        assert (red > blue + 60).mean() > 0.04


@pytest.mark.parametrize("name", SchedulerName)
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize(("base", "family"), [(SD15, Family.SD1), (SD15, Family.SD2), (SDXL, Family.SDXL)])
def test_schedule_of_the_checkpoint_is_kept(
    name: SchedulerName, prediction: Prediction, base: dict[str, Any], family: Family
) -> None:
    base = base | {"beta_end": 0.0123, "num_train_timesteps": 900}
    scheduler = make(name, base, family, prediction=prediction)
    assert type(scheduler).__name__ == SCHEDULERS[name].diffusers_class
    assert label_of(scheduler) == SCHEDULERS[name].label
    config = scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.0123, "scaled_linear")
    assert config.num_train_timesteps == 900
    assert config.prediction_type == prediction.value
    assert config.steps_offset == 1
    assert config.get("clip_sample", False) is False
    if family is Family.SDXL and SCHEDULERS[name].spacing is None:
        assert config.timestep_spacing == "leading"


def test_spacing_is_the_checkpoints_where_it_says_so() -> None:
    assert make("euler").config.timestep_spacing == "linspace"
    assert make("ddim").config.timestep_spacing == "leading"
    assert make("euler", SD15 | {"timestep_spacing": "trailing"}).config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", SchedulerName)
def test_zero_terminal_snr_is_kept_or_refused(name: SchedulerName) -> None:
    if name not in FIT_ZERO_SNR | FIT_ZERO_SNR_SPACED:
        with pytest.raises(UsageError, match="zero terminal SNR") as caught:
            make(name, ZERO_SNR, Family.SDXL, prediction=Prediction.V_PREDICTION)
        assert ", ".join(sorted(FIT_ZERO_SNR)) == ", ".join(sorted(caught.value.hint.split(": ")[1].split(", ")))
        return
    scheduler = make(name, ZERO_SNR, Family.SDXL, prediction=Prediction.V_PREDICTION)
    assert scheduler.config.rescale_betas_zero_snr is True
    assert scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999


@pytest.mark.parametrize("base", [SD15, SDXL, ZERO_SNR])
def test_own_scheduler_is_that_of_the_checkpoint(base: dict[str, Any]) -> None:
    family = Family.SD1 if base is SD15 else Family.SDXL
    scheduler = make(None, base, family, prediction=Prediction(base.get("prediction_type", "epsilon")))
    assert type(scheduler).__name__ == base["_class_name"]
    known = {key for key in base if not key.startswith("_")} & scheduler.config.keys()
    assert {key: scheduler.config[key] for key in known} == {key: base[key] for key in known}


def test_own_scheduler_of_sd_needs_no_correction_by_the_pipeline() -> None:
    old = SD15 | {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}
    assert make(None, old).config.steps_offset == 1
    assert make(None, old).config.clip_sample is False
    assert make(None, old, Family.SD2, prediction=Prediction.V_PREDICTION).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", ["", "os", "__class__", "AutoencoderKL", "Nonsense", "a.b"])
def test_own_scheduler_that_diffusers_does_not_have(kind: str) -> None:
    with pytest.raises(ArtifactError, match="not one that diffusers"):
        make(None, SD15 | {"_class_name": kind})


def test_scheduler_of_sampler_settings_does_not_leak_them(tmp_path: Path) -> None:
    karras = SD15 | {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
        "solver_type": "heun",
    }
    assert make("euler", karras).config.use_karras_sigmas is False
    assert make("unipc", karras).config.solver_type == "bh2"
    assert label_of(make(None, karras)) == "DPM++ 2M Karras"


@pytest.mark.parametrize("name", list(SchedulerName))
def test_timesteps_stay_on_the_host_where_latents_are_on_a_device(name: SchedulerName) -> None:
    """`meta` stands for a GPU: a scheduler that moved its timesteps there could not read them any more."""
    scheduler = make_scheduler(name, {}, family=Family.SD1, prediction=Prediction.EPSILON)
    steps = 4
    scheduler.set_timesteps(steps, device="meta")
    assert scheduler.timesteps.device.type == "cpu"
    scheduler.set_timesteps(num_inference_steps=steps, device=torch.device("meta"))
    assert scheduler.timesteps.device.type == "cpu"
    assert type(scheduler).__name__ == SCHEDULERS[name].diffusers_class
    again = type(scheduler).from_config(scheduler.config)
    assert type(again) is type(scheduler)


@pytest.mark.parametrize("kind", sorted(SCHEDULER_CLASSES))
def test_every_scheduler_that_a_checkpoint_may_name_draws(kind: str) -> None:
    require_known_scheduler({"_class_name": kind}, "here")
    if kind == "DPMSolverSDEScheduler":
        # It needs torchsde, which sdopt does not bring.
        with pytest.raises(ArtifactError, match="not one that diffusers"):
            make(None, SD15 | {"_class_name": kind})
        return
    require_steps(make(None, SD15 | {"_class_name": kind}), 20)


FINDS_STEPS = {"ddim": 999, "ddpm": 999, "pndm": 999, "dpm++2m": 999, "dpm++2m_sde": 999, "unipc": 999, "deis": 999}


@pytest.mark.parametrize(("name", "most"), FINDS_STEPS.items())
def test_the_limit_of_steps_is_found_by_trying(name: str, most: int) -> None:
    require_steps(make(name), most)
    kind = SCHEDULERS[SchedulerName(name)].diffusers_class
    with pytest.raises(UsageError, match=f"steps is 1000, and {kind} can do {most} at most"):
        require_steps(make(name), 1000)


def test_the_limit_follows_the_noise_schedule() -> None:
    """A table of limits would not know this checkpoint, which was trained with 100 noise levels."""
    few = SD15 | {"num_train_timesteps": 100}
    require_steps(make("ddim", few), 99)
    with pytest.raises(UsageError, match="can do 99 at most"):
        require_steps(make("ddim", few), 999)


def test_trying_takes_no_numbers_from_the_generator_of_the_process() -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    require_steps(make("euler_a"), 7)
    assert torch.equal(torch.rand(1), expected)
