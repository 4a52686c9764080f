"""A bundle of the shipped checkpoint, on reference sessions, against the same checkpoint in plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdopt
from sdopt.bundle.manifest import write_manifest
from sdopt.errors import ArtifactError, ShapeError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.request import TextToImage, parse_request
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.tasks.draw import draw_picture, draw_pictures
from tests.reference_session import TINY_SHAPES, ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPT = "a large red circle on a blue background"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    kwargs = {"num_inference_steps": 4, "generator": seeded(), "output_type": "np"} | kwargs
    images: np.ndarray = pipe(*args, **kwargs).images
    return images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def pipe(bundle: ReferenceBundle) -> Any:
    return quiet(assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions))


@pytest.fixture(scope="module")
def plain() -> Any:
    return quiet(
        diffusers.StableDiffusionPipeline.from_pretrained(TINY_SHAPES, dtype=torch.float32, safety_checker=None)
    )


def of_profile(folder: Path, profile: ShapeProfile) -> Any:
    bundle = make_bundle(folder, profile=profile)
    return quiet(assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions))


def test_is_the_diffusers_class_and_draws_what_torch_draws(pipe: Any, plain: Any) -> None:
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    np.testing.assert_allclose(draw(pipe, PROMPT), draw(plain, PROMPT), atol=1e-4)


def test_without_guidance_the_unet_is_padded(pipe: Any, plain: Any) -> None:
    arguments = {"guidance_scale": 1.0}
    np.testing.assert_allclose(draw(pipe, PROMPT, **arguments), draw(plain, PROMPT, **arguments), atol=1e-4)


def test_more_pictures_than_the_batch(pipe: Any, plain: Any) -> None:
    arguments: dict[str, Any] = {"num_images_per_prompt": 3, "negative_prompt": "green"}
    drawn = draw(pipe, PROMPT, **arguments)
    assert drawn.shape == (3, 64, 64, 3)
    np.testing.assert_allclose(drawn, draw(plain, PROMPT, **arguments), atol=1e-4)


def test_clip_skip(pipe: Any, plain: Any) -> None:
    # transformers 5 has no `text_model` in CLIPTextModel any more, where diffusers still looks for the final
    # norm.
    torch.nn.Module.__setattr__(plain.text_encoder, "text_model", torch.nn.Module())
    plain.text_encoder.text_model.final_layer_norm = plain.text_encoder.final_layer_norm
    without = draw(pipe, PROMPT)
    for skip in (0, 1):
        drawn = draw(pipe, PROMPT, clip_skip=skip)
        np.testing.assert_allclose(drawn, draw(plain, PROMPT, clip_skip=skip), atol=1e-3)
        assert np.allclose(drawn, without, atol=1e-3) == (skip == 0)


def test_callbacks_see_and_change_the_latents(pipe: Any) -> None:
    seen: list[int] = []

    def on_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * 0}

    drawn = draw(pipe, PROMPT, num_inference_steps=3, callback_on_step_end=on_step_end)
    assert seen == [0, 1, 2]
    empty = pipe.vae.decode(torch.zeros(1, 4, 16, 16)).sample
    expected = (empty / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_image_to_image_from_the_same_engines(pipe: Any, plain: Any) -> None:
    start = Image.new("RGB", (64, 64), "blue")
    ours = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    theirs = quiet(diffusers.StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False))
    assert type(ours) is diffusers.StableDiffusionImg2ImgPipeline
    built = quiet(diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    expected = draw(theirs, PROMPT, image=start, strength=0.7)
    # The picture comes in channels-last, which torch's convolutions round otherwise than the contiguous copy
    # of a run.
    np.testing.assert_allclose(draw(ours, PROMPT, image=start, strength=0.7), expected, atol=5e-3)
    np.testing.assert_allclose(draw(built, PROMPT, image=start, strength=0.7), expected, atol=5e-3)
    with pytest.raises(ShapeError, match="a picture of 128x64 px: vae_encoder was built for 64x64"):
        draw(ours, PROMPT, image=start.resize((128, 64)))


def test_inpainting_with_a_model_that_is_not_for_it(pipe: Any) -> None:
    inpaint = quiet(diffusers.AutoPipelineForInpainting.from_pipe(pipe))
    drawn = draw(inpaint, PROMPT, image=Image.new("RGB", (64, 64)), mask_image=Image.new("L", (64, 64), 255))
    assert drawn.shape == (1, 64, 64, 3)


def test_size_that_was_not_built_is_refused(pipe: Any) -> None:
    with pytest.raises(ShapeError, match="a picture of 64x128 px: unet was built for 64x64"):
        draw(pipe, PROMPT, height=128, width=64)


def test_default_size_is_the_bundles_also_where_it_is_not_square(tmp_path: Path, plain: Any) -> None:
    pipe = of_profile(tmp_path / "wide", ShapeProfile.static(height_px=64, width_px=96))
    assert draw(pipe, PROMPT).shape == (1, 64, 96, 3)
    assert draw(pipe, PROMPT, 64).shape == (1, 64, 96, 3)
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    np.testing.assert_allclose(draw(pipe, PROMPT), draw(plain, PROMPT, height=64, width=96), atol=1e-4)
    again = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    assert draw(again, PROMPT, image=Image.new("RGB", (96, 64))).shape == (1, 64, 96, 3)


def test_dynamic_profile_takes_its_whole_range(tmp_path: Path) -> None:
    profile = ShapeProfile(Extent(1, 2, 2), Extent(32, 64, 64), Extent(32, 64, 96))
    pipe = of_profile(tmp_path / "any", profile)
    assert draw(pipe, [PROMPT] * 3, height=32, width=96).shape == (3, 32, 96, 3)
    assert draw(pipe, PROMPT).shape == (1, 64, 64, 3)
    with pytest.raises(ShapeError, match=r"built for 32x32\.\.96x64"):
        draw(pipe, PROMPT, height=96, width=64)


def test_moving_and_casting(pipe: Any) -> None:
    pipe.to("cpu", torch.float16)
    assert pipe.dtype is torch.float32
    assert pipe.device == torch.device("cpu")
    with pytest.raises(UsageError, match="cannot move to cuda"):
        pipe.to("cuda")
    with pytest.raises(UsageError, match="enable_freeu"):
        pipe.enable_freeu(1, 1, 1, 1)


def test_no_warning_about_the_safety_checker(bundle: ReferenceBundle, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    assert pipe.safety_checker is None
    assert "safety" not in "".join(capfd.readouterr())


def test_damaged_bundles_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    fewer = {name: session for name, session in bundle.sessions.items() if name != ComponentName.UNET}
    with pytest.raises(ArtifactError, match="lacks unet"):
        assemble_pipeline(bundle.folder, bundle.manifest, fewer)
    weights = bundle.folder / "text_encoder" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match="final layer norm"):
        assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    weights.write_bytes(whole)
    config = bundle.folder / "scheduler" / "scheduler_config.json"
    config.write_text("[")
    with pytest.raises(ArtifactError, match=r"cannot read .*scheduler_config"):
        assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    config.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ArtifactError, match="'StableDiffusionPipeline' is not one"):
        assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)


def test_endless_tokenizers_are_cut_to_the_engine(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    path = bundle.folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    assert pipe.tokenizer.model_max_length == 77


def test_generate_is_the_pipeline_with_a_seed(pipe: Any) -> None:
    image = draw_picture(pipe, TextToImage(prompt=PROMPT, seed=3, steps=4))
    again = draw(pipe, PROMPT, generator=seeded(3), num_inference_steps=4)
    np.testing.assert_array_equal(np.asarray(image), (again[0] * 255).round().astype(np.uint8))


def test_pictures_do_not_depend_on_their_neighbours(tmp_path: Path, pipe: Any) -> None:
    batched = of_profile(tmp_path / "three", ShapeProfile.static(height_px=64, width_px=64, batch=3))
    common = {"prompt": PROMPT, "steps": 4, "scheduler": "euler_a"}
    requests = [parse_request(common | {"seed": seed}) for seed in range(4)]
    requests.append(parse_request(common | {"seed": 9, "negative_prompt": "green"}))
    shares: list[float] = []
    together = list(draw_pictures(batched, requests, on_step=shares.append))
    assert len(batched.unet.session.runs) == 3 * 4
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert isinstance(batched.scheduler, diffusers.EulerDiscreteScheduler)
    for request, image in zip(requests, together, strict=True):
        alone = np.asarray(draw_picture(pipe, request)).astype(int)
        assert np.abs(np.asarray(image) - alone).max() <= 1


def test_generate_refuses_what_cannot_be_drawn(pipe: Any, plain: Any) -> None:
    with pytest.raises(UsageError, match="steps is 60, and LCMScheduler can do 50 at most"):
        draw_picture(pipe, TextToImage(prompt="x", steps=60, scheduler="lcm"))
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    with pytest.raises(
        UsageError, match="clip_skip is 12, and this model's text encoder takes whole numbers from 0 to"
    ):
        draw_picture(pipe, TextToImage(prompt="x", steps=1, clip_skip=12))
    with pytest.raises(UsageError, match="not loaded from a bundle"):
        draw_picture(plain, TextToImage(prompt="x", scheduler="euler"))
    assert draw_picture(plain, TextToImage(prompt="x", steps=1)).size == (64, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt is missing, which text_to_image needs"),
        ({"prompt": "x", "steps": 0}, "steps is 0, and has to be a whole number from 1 to 1000"),
        ({"prompt": "x", "seed": -1}, "seed is -1, .* from 0 to 9223372036854775807"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale is nan, .* a number from 0 to 100"),
        (
            {"prompt": "x", "sampler": "euler"},
            "sampler is not something that text_to_image knows: it takes prompt, negative_prompt, ",
        ),
        ({"prompt": "\ud800"}, "prompt is not a text"),
        ({"prompt": "x", "scheduler": "eulr"}, "no scheduler 'eulr'"),
        ({"prompt": "x", "scheduler": 3}, "scheduler is 3, and has to be one of ddim, "),
        ({"prompt": "x", "steps": 20.5}, "steps is 20.5, and has to be a whole number"),
        ({"prompt": "x", "steps": True}, "steps is True"),
        ({"prompt": "x", "clip_skip": 99}, "clip_skip is 99, and has to be a whole number from 1 to 64"),
        ({"prompt": "x", "width_px": 7}, "width_px is 7, and has to be a whole number from 8 to 65536"),
        ({"prompt": "x" * 30_000}, "prompt has 30000 characters, and 20000 are the most"),
        ({"prompt": "x", "task": "video"}, "task is 'video', and sdopt knows text_to_image, image_to_image, inpaint"),
        ({"prompt": "x", "task": "inpaint", "image": "a.png"}, "mask is missing, which inpaint needs"),
        (
            {"prompt": "x", "task": "image_to_image", "image": "a.png", "strength": 0},
            "strength is 0, .* above 0 and up",
        ),
        ({"prompt": "x", "image": "a.png"}, "image is not something that text_to_image knows"),
    ],
)
def test_bad_requests_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_request(values)


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceBundle:
    """A whole bundle, opened by a backend that computes with the reference sessions."""
    bundle = make_bundle(tmp_path / "b")
    write_manifest(bundle.folder, bundle.manifest)
    # Reference sessions have no graphs, which is what the checks before opening are about.
    monkeypatch.setattr("sdopt.pipeline.load.require_sound", lambda folder, manifest: None)
    monkeypatch.setattr("sdopt.pipeline.load.open_session", lambda files, settings: bundle.sessions[files.name])
    return bundle


def test_load_opens_a_folder(on_disk: ReferenceBundle, plain: Any) -> None:
    from sdopt.pipeline.load import close_engines

    pipe = quiet(sdopt.load(on_disk.folder))
    np.testing.assert_allclose(draw(pipe, PROMPT), draw(plain, PROMPT), atol=1e-4)
    assert type(sdopt.load(str(on_disk.folder), scheduler="DPM++ 2M Karras").scheduler).__name__.startswith("DPMS")
    close_engines(pipe)
    assert all(session.closed for session in on_disk.sessions.values())


def test_engines_are_closed_where_loading_fails(on_disk: ReferenceBundle) -> None:
    with pytest.raises(UsageError, match="no scheduler 'nonsense'"):
        sdopt.load(on_disk.folder, scheduler="nonsense")
    assert all(session.closed for session in on_disk.sessions.values())
    with pytest.raises(ArtifactError, match="not an sdopt bundle"):
        sdopt.load(on_disk.folder.parent)
