"""Bundles of several sizes and prompt lengths draw what torch draws at each of them, and refuse every other size."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import Verdict
from sdopt.fidelity.candidate import open_candidate
from sdopt.fidelity.drawings import Drawing, draw_scene
from sdopt.fidelity.scene import Scene, write_scene
from sdopt.fidelity.verdict import judge_drawings
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.preflight.check import check_bundle
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.conftest import TINY_SHAPES
from tests.sdopt_process import run_sdopt

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

# The networks are too small to share out, and tests run beside each other.
torch.set_num_threads(1)

SHORT = "a large red circle on a blue background"
LONG = " and ".join([SHORT] * 10)
SIZES = {"64x64,96x64": [(64, 64), (96, 64)], "64x64..96x128": [(64, 64), (80, 128)]}


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return run_sdopt(*arguments, cache=cache)


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(size: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-shapes through `sdopt convert`, with its verdict at the first size."""
    base = tmp_path_factory.mktemp("profiles")
    output = base / "bundle"
    done = run(
        "convert", str(TINY_SHAPES), "-o", str(output), "--size", size, "--tokens", "154", "--target", "openvino",
        "--precision", "fp32", cache=base / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output


def usual_at(manifest: BundleManifest, width_px: int, height_px: int) -> BundleManifest:
    """The same bundle, drawing at another size where none is asked for."""
    old = manifest.profile
    profile = ShapeProfile(
        old.batch,
        Extent(old.height_px.min, height_px, old.height_px.max),
        Extent(old.width_px.min, width_px, old.width_px.max),
        old.tokens,
    )
    return manifest.model_copy(update={"profile": profile})


def draw(folder: Path, manifest: BundleManifest, scene: Scene, settings: BackendSettings) -> Drawing:
    with open_candidate(folder, manifest, settings) as pipe:
        return draw_scene(pipe, manifest, scene, lambda share: None)


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_it_draws_what_torch_draws_at_each_size_and_prompt_length(
    folder: Path, size: str, first: bool, tmp_path: Path
) -> None:
    width_px, height_px = SIZES[size][not first]
    manifest = usual_at(read_manifest(folder), width_px, height_px)
    scene = Scene(prompts=(SHORT, LONG), seed=1, steps=5, guidance_scale=5, inputs=tmp_path / "inputs.safetensors")
    write_scene(folder, manifest, scene)
    by_torch, floor = (
        draw(folder, manifest, scene, settings) for settings in (TorchSettings(), TorchSettings(attention="math"))
    )
    for runtime in (OpenVINOSettings(), OnnxRuntimeSettings()):
        by_engines = draw(folder, manifest, scene, runtime)
        assert by_engines.images.shape == (2, height_px, width_px, 3)
        record = judge_drawings(manifest, scene, by_torch, by_engines, floor)
        assert record.verdict is Verdict.PASS, record.reason
        assert all(image.psnr_db is None or image.psnr_db > 60 for image in record.images), record.images


def test_it_is_whole_and_says_what_it_draws(folder: Path, size: str, tmp_path: Path) -> None:
    report = check_bundle(folder)
    assert report.problems == ()
    manifest = report.manifest
    assert manifest.fidelity.verdict is Verdict.PASS
    parity = manifest.components[ComponentName.UNET].parity
    assert parity is not None
    # Two sizes with guidance, and one without.
    assert (parity.passed, parity.points) == (True, 3)
    sizes = "64x64 and 96x64" if "," in size else "64x64..96x128"
    described = f"{sizes} px, batch 1, prompts of 77 or 154 tokens"
    assert f"- size: {described}" in (folder / "README.md").read_text()
    shown = run("inspect", str(folder), cache=tmp_path)
    assert described in " ".join(shown.stderr.split())


def test_generate_takes_its_sizes_and_refuses_others_by_name(folder: Path, size: str, tmp_path: Path) -> None:
    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(
            "generate", str(folder), *arguments, "--steps", "2", "--seed", "1", "-o", str(tmp_path / "pictures"),
            "--json", cache=tmp_path,
        )  # fmt: skip

    drawn = generate(SHORT, LONG * 3, "--size", "96x64")
    assert drawn.returncode == 0, drawn.stderr
    pictures: list[dict[str, Any]] = json.loads(drawn.stdout)["pictures"]
    assert [(picture["width_px"], picture["height_px"]) for picture in pictures] == [(96, 64)] * 2
    assert "is cut after 150" in drawn.stderr
    assert " --tokens " in drawn.stderr
    again = generate("--from-image", pictures[0]["path"])
    assert again.returncode == 0, again.stderr
    assert Path(json.loads(again.stdout)["pictures"][0]["path"]).read_bytes() == Path(pictures[0]["path"]).read_bytes()
    refused = generate(SHORT, "--size", "192x64")
    assert refused.returncode == 2
    built = "64x64 and 96x64; the nearest is 96x64" if "," in size else "64x64..96x128"
    assert f"a picture of 192x64 px: unet was built for {built}" in refused.stderr
    between = generate(SHORT, "--size", "80x64")
    assert between.returncode == (2 if "," in size else 0), between.stderr


def test_bench_measures_at_the_first_size(folder: Path, tmp_path: Path) -> None:
    done = run(
        "bench", str(folder), "--against", "eager-fp32", "--steps", "2", "--repeats", "1", "--json", cache=tmp_path
    )
    assert done.returncode == 0, done.stderr
    case = json.loads(done.stdout)["case"]
    assert (case["width_px"], case["height_px"]) == (64, 64)


def test_sdxl_with_a_range_and_long_prompts(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", make_model(small_recipe(Family.SDXL)))
    output = tmp_path / "bundle"
    done = run(
        "convert", str(source), "-o", str(output), "--size", "32x32..64x64", "--tokens", "231", "--target",
        "onnxruntime", "--precision", "fp32", cache=tmp_path / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = usual_at(read_manifest(output), 48, 64)
    assert manifest.components[ComponentName.UNET].parity is not None
    scene = Scene(prompts=(SHORT, LONG * 2), seed=1, steps=4, guidance_scale=5, inputs=tmp_path / "inputs.safetensors")
    write_scene(output, manifest, scene)
    by_torch, by_engines = (
        draw(output, manifest, scene, settings) for settings in (TorchSettings(), OpenVINOSettings())
    )
    assert by_engines.images.shape == (2, 64, 48, 3)
    record = judge_drawings(manifest, scene, by_torch, by_engines, by_torch)
    assert record.verdict is Verdict.PASS, record.reason
