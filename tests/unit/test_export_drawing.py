"""What runs inside Triton, without Triton: numpy's schedules and loop against diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.bundle.manifest import read_config
from sdopt.errors import UsageError
from sdopt.export.triton.models.drawing import Drawer, Request, Tensors, make_noise
from sdopt.export.triton.models.schedules import make_schedule
from sdopt.export.triton.settings import _describe_schedule, make_settings, require_text_to_image, write_tokenizers
from sdopt.model.component import ComponentName, describe_component
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import DType
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.model.task import Task
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.pipeline.schedulers import make_scheduler
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import TINY_SHAPES, ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPTS = (
    "a large red circle on a blue background",
    "a small green star",
    "an ÆRTHLING, 3 ships & 'tis a very " + "long " * 90,
)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    return make_bundle(tmp_path_factory.mktemp("export") / "tiny")


@dataclass
class InProcess:
    """Networks of a reference bundle, as Triton would run them; keeps what the VAE was given."""

    bundle: ReferenceBundle
    decoded: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def __call__(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        session = self.bundle.sessions[ComponentName(model)]
        if model == ComponentName.VAE_DECODER:
            self.decoded.append(inputs["latent_sample"])
        fitted = {
            name: torch.from_numpy(np.array(value.reshape(()) if name == "timestep" else value))
            for name, value in inputs.items()
        }
        results = session.run(fitted)
        return {name: results[name].numpy() for name in outputs}


def make_drawer(bundle: ReferenceBundle, folder: Path, scheduler: str | None = None) -> tuple[Drawer, InProcess]:
    names = [name for name in ComponentName if name in bundle.sessions and name is not ComponentName.VAE_ENCODER]
    extents = bundle.sessions[ComponentName.UNET].extents
    values = make_settings(bundle.folder, bundle.manifest, {name: name.value for name in names}, extents, scheduler)
    write_tokenizers(bundle.folder, values, folder)
    run = InProcess(bundle)
    # As it is read in Triton: what JSON cannot hold must not be needed.
    return Drawer(json.loads(json.dumps(values)), folder, run), run


def ask(bundle: ReferenceBundle, count: int, **changes: Any) -> Request:
    profile = bundle.manifest.profile
    factor = 2 ** (len(json.loads((bundle.folder / "vae_decoder/config.json").read_text())["block_out_channels"]) - 1)
    shape = (4, profile.height_px.opt // factor, profile.width_px.opt // factor)
    values: dict[str, Any] = {
        "prompts": PROMPTS[:count], "negatives": None, "noise": make_noise(range(5, 5 + count), shape), "steps": 4,
        "guidance_scale": 4.0,
    }  # fmt: skip
    return Request(**values | changes)


def draw_with_diffusers(bundle: ReferenceBundle, request: Request, scheduler: str | None, output: str) -> Any:
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        list(request.prompts), negative_prompt=None if request.negatives is None else list(request.negatives),
        num_inference_steps=request.steps, guidance_scale=request.guidance_scale,
        latents=torch.from_numpy(request.noise), output_type=output,
    ).images  # fmt: skip


def require_same(bundle: ReferenceBundle, folder: Path, request: Request, scheduler: str | None = None) -> None:
    drawer, run = make_drawer(bundle, folder, scheduler)
    pictures = drawer.draw(request)
    theirs = np.stack([np.asarray(image) for image in draw_with_diffusers(bundle, request, scheduler, "pil")])
    assert pictures.shape == theirs.shape
    assert np.abs(pictures.astype(int) - theirs).max() <= 1
    ours = np.concatenate(run.decoded)[: len(pictures)] * drawer.settings["vae"]["scaling_factor"]
    latents = draw_with_diffusers(bundle, request, scheduler, "latent").numpy()
    np.testing.assert_allclose(ours, latents, rtol=1e-3, atol=1e-4 * np.abs(latents).max())


@pytest.mark.parametrize("scheduler", [None, "euler", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draws_what_diffusers_draws(
    scheduler: str | None, guidance: float, tiny: ReferenceBundle, tmp_path: Path
) -> None:
    require_same(tiny, tmp_path, ask(tiny, 1, guidance_scale=guidance), scheduler)


@pytest.mark.parametrize("negatives", [None, ("", "blue", "a star")])
def test_several_prompts_and_their_negatives(
    negatives: tuple[str, ...] | None, tiny: ReferenceBundle, tmp_path: Path
) -> None:
    require_same(tiny, tmp_path, ask(tiny, 3, negatives=negatives))


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL])
@pytest.mark.parametrize(
    ("batch", "negatives"), [(Extent(1, 1, 1), None), (Extent(2, 2, 2), ("", "", "")), (Extent(1, 1, 2), None)]
)
def test_other_families_and_batches(
    family: Family, batch: Extent, negatives: tuple[str, ...] | None, tmp_path: Path
) -> None:
    prediction = Prediction.V_PREDICTION if family is Family.SD2 else Prediction.EPSILON
    recipe = small_recipe(family)
    recipe.scheduler.update(SCHEDULE, prediction_type=prediction.value, timestep_spacing="leading", steps_offset=1)
    source = write_folder(tmp_path / "source", make_model(recipe))
    profile = ShapeProfile(batch, Extent.static(32), Extent.static(48))
    bundle = make_bundle(tmp_path / "bundle", source, family=family, prediction=prediction, profile=profile)
    require_same(bundle, tmp_path, ask(bundle, 3, negatives=negatives), "euler")


def test_a_picture_does_not_depend_on_its_neighbours(tiny: ReferenceBundle, tmp_path: Path) -> None:
    drawer, _ = make_drawer(tiny, tmp_path)
    together, alone = ask(tiny, 2), ask(tiny, 2)
    second = Request(alone.prompts[1:], None, alone.noise[1:], alone.steps, alone.guidance_scale)
    assert np.array_equal(drawer.draw(together)[1], drawer.draw(second)[0])


def test_noise_is_of_the_seed_alone() -> None:
    together = make_noise([3, 4], (4, 8, 8))
    assert np.array_equal(together[1], make_noise([4], (4, 8, 8))[0])
    assert not np.array_equal(together[0], together[1])
    assert abs(float(together.std()) - 1) < 0.1


@given(text=st.text(max_size=400))
@settings(deadline=None, max_examples=200)
def test_tokens_are_those_of_transformers(
    text: str, tiny: ReferenceBundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import CLIPTokenizer

    drawer, _ = make_drawer(tiny, tmp_path_factory.mktemp("tokens"))
    theirs = CLIPTokenizer.from_pretrained(TINY_SHAPES / "tokenizer")
    wanted = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert drawer._tokenizers["text_encoder"].encode(text).ids == wanted


def describe(
    folder: Path, config: dict[str, Any], prediction: Prediction, name: str | None, tiny: ReferenceBundle
) -> Any:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return _describe_schedule(folder, tiny.manifest.model_copy(update={"prediction": prediction}), name)


# Without any signal at the last step DDIM cannot tell the picture from the noise: diffusers divides by zero, too.
@pytest.mark.parametrize(
    ("name", "prediction", "zero_snr"),
    [case for case in product(("euler", "ddim"), Prediction, (False, True)) if case != ("ddim", "epsilon", True)],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_schedules_are_those_of_diffusers(
    prediction: Prediction, spacing: str, zero_snr: bool, name: str, steps: int, tiny: ReferenceBundle, tmp_path: Path
) -> None:
    config = {**SCHEDULE, "_class_name": "PNDMScheduler", "timestep_spacing": spacing, "steps_offset": 1,
              "rescale_betas_zero_snr": zero_snr}  # fmt: skip
    theirs: Any = make_scheduler(name, config, family=Family.SD1, prediction=prediction)
    theirs.set_timesteps(steps)
    ours = make_schedule(json.loads(json.dumps(describe(tmp_path, config, prediction, name, tiny))), steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert float(ours.initial_scale) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    random = np.random.default_rng(0)
    sample = random.standard_normal((1, 4, 8, 8), np.float32) * ours.initial_scale
    followed = torch.from_numpy(sample.copy())
    for index, timestep in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(followed, timestep)
        np.testing.assert_allclose(ours.scale(sample, index), scaled.numpy(), rtol=1e-3, atol=1e-3)
        predicted = random.standard_normal(sample.shape, np.float32)
        sample = ours.step(predicted, sample, index)
        followed = theirs.step(torch.from_numpy(predicted), timestep, followed).prev_sample
    np.testing.assert_allclose(sample, followed.numpy(), rtol=1e-3, atol=1e-3 * float(followed.abs().max()))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps: int, tiny: ReferenceBundle, tmp_path: Path) -> None:
    values = describe(tmp_path, SCHEDULE, Prediction.EPSILON, "euler", tiny)
    with pytest.raises(ValueError, match="steps must be 1 to 1000"):
        make_schedule(values, steps)


def test_ddim_refuses_steps_that_begin_after_the_last_timestep(tiny: ReferenceBundle, tmp_path: Path) -> None:
    values = describe(tmp_path, {**SCHEDULE, "timestep_spacing": "leading"}, Prediction.EPSILON, "ddim", tiny)
    with pytest.raises(ValueError, match="ask for fewer"):
        make_schedule(values, 1000)


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, None, "use_karras_sigmas"),
     ({"_class_name": "LCMScheduler"}, None, "LCMScheduler"),
     ({"_class_name": "PNDMScheduler"}, "dpm++2m", "euler, ddim")],
)  # fmt: skip
def test_schedulers_that_triton_has_not_are_refused(
    config: dict[str, Any], name: str | None, said: str, tiny: ReferenceBundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        describe(tmp_path, SCHEDULE | config, Prediction.EPSILON, name, tiny)


def test_networks_that_take_bf16_are_refused(tiny: ReferenceBundle) -> None:
    record = tiny.manifest.components[ComponentName.UNET]
    config = read_config(tiny.folder, ComponentName.UNET)
    spec = describe_component(ComponentName.UNET, config, tiny.manifest.family, DType.BF16)
    unet = {ComponentName.UNET: record.model_copy(update={"spec": spec})}
    with pytest.raises(UsageError, match="takes bf16"):
        require_text_to_image(tiny.manifest.model_copy(update={"components": {**tiny.manifest.components, **unet}}))


def test_models_that_begin_with_a_picture_are_refused(tiny: ReferenceBundle) -> None:
    require_text_to_image(tiny.manifest)
    with pytest.raises(UsageError, match="starts from a picture"):
        require_text_to_image(tiny.manifest.model_copy(update={"tasks": (Task.INPAINT,)}))
    with pytest.raises(UsageError, match="starts from a picture"):
        require_text_to_image(tiny.manifest.model_copy(update={"tasks": (Task.IMAGE_TO_IMAGE, Task.INPAINT)}))
    longer = ShapeProfile.static(height_px=64, width_px=64, tokens=154)
    with pytest.raises(UsageError, match="154 tokens"):
        require_text_to_image(tiny.manifest.model_copy(update={"profile": longer}))
