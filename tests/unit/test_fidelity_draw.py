"""Drawing a scene with real pipelines of small random networks, on the torch backend, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sdopt.bundle.manifest import BundleManifest
from sdopt.fidelity.candidate import dump_settings, open_candidate, parse_settings
from sdopt.fidelity.compare_drawings import compare_apart, compare_drawings
from sdopt.fidelity.drawings import Drawing, draw_isolated, draw_scene, draw_twice_isolated, read_drawing, write_drawing
from sdopt.fidelity.references import NOISE_FLOOR, REFERENCE
from sdopt.fidelity.scene import Scene, write_scene
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings, TorchSettings
from sdopt.model.family import Family
from sdopt.model.precision import Precision
from sdopt.model.shape import ShapeProfile
from sdopt.model.task import Task
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CASES = {
    "sd1": (Family.SD1, False),
    "sd1-inpainting": (Family.SD1, True),
    "sdxl": (Family.SDXL, False),
    "sdxl-inpainting": (Family.SDXL, True),
    "refiner": (Family.SDXL_REFINER, False),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    family, inpainting = CASES[request.param]
    recipe = small_recipe(family, inpainting=inpainting)
    source = write_folder(tmp_path_factory.mktemp("model") / "source", make_model(recipe))
    return make_bundle(
        tmp_path_factory.mktemp("bundle"), source, family=family, inpainting=inpainting,
        profile=ShapeProfile.static(height_px=32, width_px=48),
    )  # fmt: skip


def draw(bundle: ReferenceBundle, scene: Scene, settings: TorchSettings | None = None) -> tuple[Drawing, list[float]]:
    told: list[float] = []
    with open_candidate(bundle.folder, bundle.manifest, settings) as pipeline:
        return draw_scene(pipeline, bundle.manifest, scene, told.append), told


def make_scene(folder: Path, bundle: ReferenceBundle, *prompts: str, steps: int = 2) -> Scene:
    scene = Scene(prompts=prompts, seed=3, steps=steps, guidance_scale=5, inputs=folder / "inputs.safetensors")
    write_scene(bundle.folder, bundle.manifest, scene)
    return scene


def test_every_kind_of_pipeline_draws_the_scene(case: ReferenceBundle, tmp_path: Path) -> None:
    scene = make_scene(tmp_path, case, "a castle", "the sea")
    one, told = draw(case, scene)
    assert one.images.shape == (2, 32, 48, 3)
    assert one.latents.shape[:3] == (2, 2, 4)
    assert np.isfinite(one.images).all()
    assert one.scheduler == "DDIM"
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    again, _ = draw(case, scene, TorchSettings())
    assert (again.latents == one.latents).all()
    assert not np.allclose(one.images[0], one.images[1])


def test_inputs_hold_a_picture_only_where_the_pipeline_starts_from_one(case: ReferenceBundle, tmp_path: Path) -> None:
    inputs = load_file(make_scene(tmp_path, case, "a castle").inputs)
    assert ("image" in inputs) == ("mask" in inputs) == (Task.TEXT_TO_IMAGE not in case.manifest.tasks)
    if "image" in inputs:
        assert inputs["image"].shape == (32, 48, 3)
        assert inputs["image"].std() > 10
        assert 0.2 < (inputs["mask"] == 255).mean() < 0.3


def test_latents_are_those_of_diffusers_for_the_seed(case: ReferenceBundle, tmp_path: Path) -> None:
    latents = load_file(make_scene(tmp_path, case, "a", "b").inputs)["latents"]
    for index in range(2):
        expected = torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(3 + index))
        assert (latents[index] == expected[0].numpy()).all()


def test_a_batch_that_is_not_full_is_drawn_too(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", make_model(small_recipe(Family.SD1)))
    profile = ShapeProfile.static(height_px=32, width_px=32, batch=2)
    three = make_bundle(tmp_path / "two", source, profile=profile)
    single = make_bundle(tmp_path / "one", source, profile=ShapeProfile.static(height_px=32, width_px=32))
    scene = make_scene(tmp_path, three, "a castle", "the sea", "a star")
    by_twos, told = draw(three, scene)
    assert by_twos.images.shape[0] == by_twos.latents.shape[0] == 3
    assert told[-1] == pytest.approx(1)
    assert np.allclose(by_twos.images, draw(single, scene)[0].images, atol=1e-4)


def test_torch_drawing_twice_in_one_process_is_torch_drawing_in_two(tmp_path: Path) -> None:
    """The second drawing is the noise floor: by the other kernel, from the same weights and the same noise."""
    source = write_folder(tmp_path / "source", make_model(small_recipe(Family.SD1)))
    bundle = make_bundle(tmp_path / "bundle", source, profile=ShapeProfile.static(height_px=32, width_px=32))
    scene = make_scene(tmp_path, bundle, "a castle", "the sea")
    outputs = (tmp_path / "first.safetensors", tmp_path / "second.safetensors")
    first, second = draw_twice_isolated(
        bundle.folder, bundle.manifest, REFERENCE, scene, outputs, label="torch fp32"
    )  # fmt: skip
    for drawn, settings in ((first, REFERENCE), (second, NOISE_FLOOR)):
        alone = draw_isolated(bundle.folder, bundle.manifest, settings, scene, tmp_path / "alone", label="alone")
        assert (drawn.images == alone.images).all()
        assert (drawn.latents == alone.latents).all()
    assert not (first.latents == second.latents).all()


def test_figures_of_files_are_those_of_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((2, 64, 64, 3), dtype=np.float32)
    latents = rng.random((2, 3, 4, 8, 8), dtype=np.float32)
    scene = Scene(prompts=("a", "b"), seed=0, steps=3, guidance_scale=5, inputs=tmp_path / "inputs")
    drawings = []
    for number, shift in enumerate((0.0, 0.02, 0.001)):
        write_drawing(Drawing(images * (1 - shift), latents + shift), tmp_path / f"{number}")
        drawings.append(read_drawing(tmp_path / f"{number}"))
    assert compare_apart(scene, *drawings) == compare_drawings(scene, *drawings)


@pytest.mark.parametrize(
    "settings",
    [None, TorchSettings(compile=True), OnnxRuntimeSettings(), OpenVINOSettings(inference_precision=Precision.BF16)],
)
def test_settings_cross_to_the_child(settings: Any) -> None:
    assert parse_settings(dump_settings(settings)) == settings


def test_the_manifest_crosses_to_the_child(case: ReferenceBundle) -> None:
    assert BundleManifest.model_validate_json(case.manifest.model_dump_json()) == case.manifest
