"""Every family on reference sessions, against the plain diffusers pipeline of the same random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdopt.errors import ArtifactError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.model.request import TextToImage
from sdopt.model.shape import ShapeProfile
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.tasks.draw import draw_picture
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CASES = {
    "sd2": (Family.SD2, False, Prediction.V_PREDICTION, diffusers.StableDiffusionPipeline),
    "sd1-inpainting": (Family.SD1, True, Prediction.EPSILON, diffusers.StableDiffusionInpaintPipeline),
    "sdxl": (Family.SDXL, False, Prediction.EPSILON, diffusers.StableDiffusionXLPipeline),
    "sdxl-inpainting": (Family.SDXL, True, Prediction.EPSILON, diffusers.StableDiffusionXLInpaintPipeline),
    "refiner": (Family.SDXL_REFINER, False, Prediction.EPSILON, diffusers.StableDiffusionXLImg2ImgPipeline),
}
PROMPT = "a castle by the sea"
PICTURE = Image.effect_noise((48, 32), 80).convert("RGB")
MASK = Image.new("L", (48, 32), 0)
MASK.paste(255, (8, 8, 30, 24))


def load_plain(folder: Path, kind: Any, **flags: Any) -> Any:
    """diffusers' own pipeline, part by part: `from_pretrained` would ask for the class in the folder's index."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32),
        "text_encoder": None,
        "tokenizer": None,
    }
    for path in folder.glob("text_encoder*"):
        config = json.loads((path / "config.json").read_text())
        projected = config["architectures"] == ["CLIPTextModelWithProjection"]
        encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config)).eval()
        encoder.load_state_dict({key: value.float() for key, value in load_file(path / "model.safetensors").items()})
        parts[path.name] = encoder
        tokenizer = path.name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=flags.pop("prediction"),
    )
    pipe = kind(**parts, scheduler=scheduler, **flags)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **kwargs: Any) -> np.ndarray:
    common = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    images: np.ndarray = pipe(PROMPT, **common | kwargs).images
    return images


def picture_inputs(case: str) -> dict[str, Any]:
    if "inpainting" in case:
        return {"image": PICTURE, "mask_image": MASK}
    return {"image": PICTURE, "strength": 1.0} if case == "refiner" else {}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, inpainting, prediction, _ = CASES[case]
    recipe = small_recipe(family, inpainting=inpainting)
    recipe.scheduler.update(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction.value,
    )
    if family is Family.SDXL_REFINER:
        recipe.options.update(force_zeros_for_empty_prompt=False, requires_aesthetics_score=True)
    return write_folder(tmp_path_factory.mktemp(case) / "source", make_model(recipe))


@pytest.fixture(scope="module")
def bundle(case: str, source: Path) -> ReferenceBundle:
    family, inpainting, prediction, _ = CASES[case]
    return make_bundle(
        source.parent / "bundle",
        source,
        family=family,
        prediction=prediction,
        inpainting=inpainting,
        profile=ShapeProfile.static(height_px=32, width_px=48),
    )


@pytest.fixture
def pipe(bundle: ReferenceBundle) -> Any:
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(case: str, source: Path) -> Any:
    family, _, prediction, kind = CASES[case]
    flags: dict[str, Any] = {"prediction": prediction.value}
    if not family.is_xl:
        flags |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family is Family.SDXL_REFINER:
        flags |= {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    return load_plain(source, kind, **flags)


def test_draws_what_torch_draws_at_the_bundles_size(case: str, pipe: Any, plain: Any) -> None:
    assert isinstance(pipe, CASES[case][3])
    inputs = picture_inputs(case)
    size = {} if case == "refiner" else {"height": 32, "width": 48}
    drawn = draw(pipe, **inputs)
    assert drawn.shape == (1, 32, 48, 3)
    np.testing.assert_allclose(drawn, draw(plain, **inputs, **size), atol=5e-3)
    guided = {"negative_prompt": "fog", "num_images_per_prompt": 2, "guidance_scale": 3.0}
    np.testing.assert_allclose(draw(pipe, **inputs, **guided), draw(plain, **inputs, **size, **guided), atol=5e-3)
    if case.startswith("sdxl"):
        # SDXL counts from the last but one; SD is tested with the shipped checkpoint.
        skipping = {"clip_skip": 1}
        np.testing.assert_allclose(
            draw(pipe, **inputs, **skipping), draw(plain, **inputs, **size, **skipping), atol=5e-3
        )
    unguided = {"guidance_scale": 1.0}
    np.testing.assert_allclose(draw(pipe, **inputs, **unguided), draw(plain, **inputs, **size, **unguided), atol=5e-3)


def test_generate_draws_from_a_prompt_or_says_what_is_missing(case: str, pipe: Any) -> None:
    request = TextToImage(prompt=PROMPT, steps=2, scheduler="dpm++2m")
    if not picture_inputs(case):
        assert draw_picture(pipe, request).size == (48, 32)
        return
    with pytest.raises(UsageError, match="starts from a picture"):
        draw_picture(pipe, request)


def test_relatives_are_found_by_from_pipe(case: str, pipe: Any, plain: Any) -> None:
    ours = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    theirs = diffusers.AutoPipelineForImage2Image.from_pipe(plain)
    assert type(ours) is type(theirs)
    if "inpainting" in case:
        return
    for relative in (ours, theirs):
        relative.set_progress_bar_config(disable=True)
    arguments = {"image": PICTURE, "strength": 0.9}
    np.testing.assert_allclose(draw(ours, **arguments), draw(theirs, **arguments), atol=5e-3)


def test_every_network_is_needed(bundle: ReferenceBundle) -> None:
    for name in bundle.sessions:
        fewer = {other: session for other, session in bundle.sessions.items() if other is not name}
        if name is ComponentName.VAE_ENCODER:
            assert assemble_pipeline(bundle.folder, bundle.manifest, fewer).vae.encoder is None
            continue
        with pytest.raises(ArtifactError, match=f"lacks {name}"):
            assemble_pipeline(bundle.folder, bundle.manifest, fewer)
