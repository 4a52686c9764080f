"""The LoRAs and the word that ship with tiny-shapes show in pictures what they say: through slots, and in torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdopt
from sdopt.adapters.metadata import read_metadata
from sdopt.model.family import Family
from tests.conftest import TINY_ADAPTERS, TINY_SHAPES
from tests.opened_pipeline import opened_pipeline
from tests.shapes_check import load_check
from tests.slotted_bundle import add_slots_to

torch.set_num_threads(1)
check = load_check()
LORAS = ("outlines", "palette", "few-steps")
LINE_PX = 3.5
PALETTE = ("white", "blue")
SCENES = [
    check.Scene("circle", "red", "yellow", "large", "left"),
    check.Scene("square", "green", "black", "large", "right"),
    check.Scene("triangle", "purple", "white", "large", "bottom"),
    check.Scene("circle", "orange", "green", "large", "centre"),
]
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipe(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with opened_pipeline(add_slots_to(pristine_bundle, tmp_path_factory.mktemp("trained") / "bundle")) as opened:
        yield opened


def draw(pipe: Any, scene: Any, tags: str = "", **fields: Any) -> Pixels:
    prompt = f"{check.write_prompt(scene)}{tags}"
    request = {"prompt": prompt, "steps": 10, "seed": 3, "guidance_scale": 4.0, **fields}
    return np.array(sdopt.draw(pipe, request, lora_folders=[TINY_ADAPTERS]))


def test_more_of_outlines_leaves_less_of_the_filling(pipe: Any) -> None:
    for scene in SCENES:
        pictures = [draw(pipe, scene, f"<lora:outlines:{weight}>") for weight in (0, 0.5, 1)]
        assert np.array_equal(pictures[0], draw(pipe, scene))
        filling = [check.measure_filling(pixels, scene) for pixels in pictures]
        assert filling[0] > 0.95
        assert filling[0] >= filling[1] >= filling[2], (scene, filling)
        assert filling[2] < 0.1, scene


def test_outlines_keep_the_shape_the_colours_and_the_place(pipe: Any) -> None:
    """Of all scenes that differ in one of them, none is nearer to what is drawn than the one that was asked for."""
    for scene in SCENES[:2]:
        drawn = draw(pipe, scene, "<lora:outlines:1>")
        changes = {"shape": check.SHAPES, "colour": check.COLOURS, "ground": check.COLOURS, "place": check.PLACES}
        others = [replace(scene, **{name: value}) for name, values in changes.items() for value in values]
        nearest = min(others, key=lambda other: distance(drawn, check.draw_scene(other, line_px=LINE_PX)))
        assert nearest == scene
        assert distance(drawn, check.draw_scene(scene)) > distance(drawn, check.draw_scene(scene, line_px=LINE_PX))


def distance(drawn: Pixels, wanted: Pixels) -> float:
    return float(np.abs(drawn.astype(float) - wanted).mean())


def test_more_of_palette_is_nearer_to_white_on_blue(pipe: Any) -> None:
    means = []
    for weight in (0, 0.5, 1):
        pictures = [draw(pipe, scene, f"<lora:palette:{weight}>") for scene in SCENES]
        means.append(np.mean([check.measure_palette_distance(pixels, PALETTE) for pixels in pictures]))
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.15 * means[0]
    for scene, pixels in zip(SCENES, pictures, strict=True):
        assert check.judge_image(pixels, replace(scene, colour="white", ground="blue")).everything, scene


def test_two_blended_do_both(pipe: Any) -> None:
    distances: dict[str, list[float]] = {"": [], "<lora:palette:1>": []}
    for scene in SCENES:
        for palette, found in distances.items():
            drawn = draw(pipe, scene, f"<lora:outlines:1>{palette}")
            found.append(check.measure_palette_distance(drawn, PALETTE))
        assert check.measure_filling(drawn, replace(scene, colour="white", ground="blue")) < 0.2, scene
    without, blended = (np.mean(found) for found in distances.values())
    assert blended < 0.3 * without


def test_swapping_trained_loras_leaves_no_trace(pipe: Any) -> None:
    scene, tags = SCENES[0], ("<lora:outlines:1>", "<lora:palette:1>", "", "<lora:outlines:1>", "<lora:palette:1>", "")
    first: dict[str, Pixels] = {}
    for tag in tags:
        drawn = draw(pipe, scene, tag)
        assert np.array_equal(first.setdefault(tag, drawn), drawn), tag


def test_two_steps_are_right_where_the_checkpoint_is_not(pipe: Any) -> None:
    scenes = check.sample_scenes(20, 9)
    shares = {}
    for tag in ("", "<lora:few-steps:1>"):
        pictures = [draw(pipe, scene, tag, steps=2, guidance_scale=1.0, seed=seed) for seed, scene in enumerate(scenes)]
        shares[tag] = count_right(pictures, scenes)
    plain, tuned = shares.values()
    assert plain["everything"] <= 0.3
    assert tuned["shape"] >= plain["shape"] + 0.3
    assert tuned["colour"] >= plain["colour"] + 0.3


def count_right(pictures: list[Pixels], scenes: list[Any]) -> dict[str, float]:
    verdicts = [check.judge_image(pixels, scene) for pixels, scene in zip(pictures, scenes, strict=True)]
    shares: dict[str, float] = check.count_right(verdicts)
    return shares


def test_without_its_alphas_a_lora_is_another(pipe: Any, tmp_path: Path) -> None:
    """The planted fault: `alpha` doubled is the weight doubled, so it is read and not taken for granted."""
    tensors = load_file(TINY_ADAPTERS / "outlines.safetensors")
    doubled = {key: 2 * tensor if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    save_file(doubled, tmp_path / "doubled.safetensors")
    half = [{"source": str(tmp_path / "doubled.safetensors"), "unet": 0.5}]
    drawn = draw(pipe, SCENES[0], loras=half)
    assert np.array_equal(drawn, draw(pipe, SCENES[0], "<lora:outlines:1>"))


@pytest.fixture(scope="module")
def torch_pipe() -> Any:
    opened = diffusers.StableDiffusionPipeline.from_pretrained(TINY_SHAPES, safety_checker=None, dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


def test_the_word_moon_is_a_white_circle_on_black(torch_pipe: Any) -> None:
    places = ("left", "right", "top", "bottom")
    scenes = [check.Scene("circle", "white", "black", "large", place) for place in places]
    prompts = [f"a large moon, {place}" for place in places]

    def draw_in_torch() -> dict[str, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        options = {"num_inference_steps": 10, "guidance_scale": 4.0, "generator": generators}
        return count_right([np.array(image) for image in torch_pipe(prompts, **options).images], scenes)

    without = draw_in_torch()
    torch_pipe.load_textual_inversion(TINY_ADAPTERS / "moon.safetensors", token="moon")
    taught = draw_in_torch()
    assert without["everything"] == 0
    assert taught["everything"] == 1


@pytest.mark.parametrize("name", [*LORAS, "moon"])
def test_files_are_small_and_finite(name: str) -> None:
    path = TINY_ADAPTERS / f"{name}.safetensors"
    assert path.stat().st_size < 300_000
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize(
    ("name", "words"), [("outlines", ["outlines"]), ("palette", ["blueprint"]), ("few-steps", [])], ids=LORAS
)
def test_the_files_say_what_they_are(name: str, words: list[str]) -> None:
    path = TINY_ADAPTERS / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        said = read_metadata(file.metadata(), "another-name")
    assert said.title.startswith(name)
    assert list(said.trigger_words) == words
    assert said.family is Family.SD1
