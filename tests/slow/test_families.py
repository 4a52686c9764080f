"""Every family, as a folder and as a single file in the original layout, through convert and back to a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import Verdict
from sdopt.convert.convert import convert
from sdopt.convert.decide import open_plan
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe, VerifySettings
from sdopt.model.target import Runtime, Target
from sdopt.model.task import Task
from sdopt.preflight.check import check_bundle
from tests.checkpoints import Model, make_model, small_recipe, to_original, write_folder, write_single_file

SIZE = "64x32"
# Pictures are judged for one pipeline of each kind; the others stop after parity. SD1's own is tiny-shapes, elsewhere.
JUDGED = {(Family.SD1, True), (Family.SD2, False), (Family.SDXL, False), (Family.SDXL_REFINER, False)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def build(source: Path, output: Path, verify: VerifySettings, prediction: Prediction | None = None) -> BundleManifest:
    recipe = BuildRecipe(
        source=str(source), target=Target(Runtime.ONNXRUNTIME), precision=Precision.FP32, size=SIZE,
        prediction=prediction, verify=verify,
    )  # fmt: skip
    return convert(open_plan(recipe), output)


def draw(folder: Path) -> Image.Image:
    pipe = sdopt.load(folder)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.full((32, 64, 3), 120, np.uint8))
    extra: dict[str, object] = {}
    if "Inpaint" in type(pipe).__name__:
        extra = {"image": picture, "mask_image": picture, "height": 32, "width": 64}
    elif "Img2Img" in type(pipe).__name__:
        extra = {"image": picture, "strength": 1.0}
    image = pipe("a small green star", num_inference_steps=2, **extra).images[0]
    assert isinstance(image, Image.Image)
    return image


@pytest.mark.parametrize("inpainting", [False, True], ids=["text2img", "inpaint"])
@pytest.mark.parametrize("family", list(Family))
def test_folder_and_single_file_become_the_same_verified_bundle(
    family: Family, inpainting: bool, tmp_path: Path
) -> None:
    model: Model = make_model(small_recipe(family, inpainting=inpainting))
    folder = write_folder(tmp_path / "folder", model)
    prediction = Prediction.V_PREDICTION if family is Family.SD2 else Prediction.EPSILON
    judged = (family, inpainting) in JUDGED
    verify = VerifySettings(fidelity=judged, steps=4, prompts=("a small green star",))
    manifest = build(folder, tmp_path / "from-folder", verify, prediction)
    assert (manifest.family, manifest.own_task is Task.INPAINT) == (family, inpainting)
    assert manifest.fidelity.verdict is (Verdict.PASS if judged else Verdict.NOT_VERIFIED)
    assert all(part.parity and part.parity.passed for part in manifest.components.values())
    assert check_bundle(tmp_path / "from-folder").problems == ()
    assert draw(tmp_path / "from-folder").size == (64, 32)

    file = write_single_file(tmp_path / "model.safetensors", to_original(model))
    single = build(file, tmp_path / "from-file", VerifySettings(enabled=False), prediction)
    assert single.source.digest == manifest.source.digest
    for name, part in single.components.items():
        assert part.architecture == manifest.components[name].architecture, f"{name} was traced again"


def test_unmarked_sd2_file_is_probed_by_running_its_unet(tmp_path: Path) -> None:
    model = make_model(small_recipe(Family.SD2))
    file = write_single_file(tmp_path / "model.safetensors", to_original(model))
    manifest = build(file, tmp_path / "bundle", VerifySettings(enabled=False))
    # Random weights give nothing of their input back, as a UNet that predicts the velocity.
    assert manifest.prediction is Prediction.V_PREDICTION
    scheduler = json.loads((tmp_path / "bundle/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert ComponentName.UNET in manifest.components
