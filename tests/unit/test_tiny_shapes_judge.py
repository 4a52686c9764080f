"""The judge of `tiny-shapes` is right about pictures of known content and catches every planted fault."""

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFilter

SCRIPT = Path(__file__).parents[2] / "scripts" / "tiny_shapes_check.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_shapes_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load_script()
SCENES = check.sample_scenes(60, seed=1)


@pytest.mark.parametrize("scene", SCENES, ids=check.write_prompt)
def test_ground_truth_is_right_in_everything(scene):
    assert check.judge_image(check.draw_scene(scene, random.Random(2)), scene).everything


@pytest.mark.parametrize("shape", check.SHAPES)
@pytest.mark.parametrize("size", check.SIZES)
@pytest.mark.parametrize("place", check.PLACES)
def test_every_outline_is_read_at_every_place(shape, size, place):
    scene = check.Scene(shape, "orange", "yellow", size, place)  # the two colours nearest to each other
    assert check.judge_image(check.draw_scene(scene), scene).everything


@pytest.mark.parametrize("attribute", ["shape", "colour", "ground", "size", "place"])
def test_a_planted_fault_is_caught_and_nothing_else_is_blamed(attribute):
    choices = {
        "shape": check.SHAPES,
        "colour": list(check.COLOURS),
        "ground": list(check.COLOURS),
        "size": list(check.SIZES),
        "place": list(check.PLACES),
    }
    rng = random.Random(3)
    for wanted in SCENES[:12]:
        taken = {getattr(wanted, attribute)}
        if attribute in ("colour", "ground"):
            taken = {wanted.colour, wanted.ground}
        fault = rng.choice([value for value in choices[attribute] if value not in taken])
        drawn = check.draw_scene(replace(wanted, **{attribute: fault}), rng)
        verdict = check.judge_image(drawn, wanted)
        wrong = {name for name, right in vars(verdict).items() if not right}
        assert wrong == {attribute}, check.write_prompt(wanted)


@pytest.mark.parametrize("scene", SCENES[:12], ids=check.write_prompt)
def test_a_soft_and_noisy_picture_reads_the_same(scene):
    soft = Image.fromarray(check.draw_scene(scene, random.Random(4))).filter(ImageFilter.GaussianBlur(0.7))
    noise = np.random.default_rng(5).normal(0, 8, (64, 64, 3))
    pixels = (np.asarray(soft) + noise).clip(0, 255).astype(np.uint8)
    assert check.judge_image(pixels, scene).everything


def test_an_empty_picture_has_a_ground_and_nothing_else():
    empty = np.full((64, 64, 3), check.COLOURS["green"], dtype=np.uint8)
    assert check.read_image(empty) == check.Reading(None, None, "green", None, None)


def test_noise_is_nothing():
    pixels = np.random.default_rng(6).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    reading = check.read_image(pixels)
    assert (reading.shape, reading.size, reading.place) == (None, None, None)


def test_two_shapes_are_no_shape():
    left = check.draw_scene(check.Scene("circle", "red", "white", "small", "left"))
    right = check.draw_scene(check.Scene("circle", "red", "white", "small", "right"))
    both = np.concatenate([left[:, :32], right[:, 32:]], axis=1)
    assert check.read_image(both).shape is None


def test_a_colour_without_a_name_is_refused():
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert check.read_image(grey).ground is None


def test_a_shape_between_two_places_has_none():
    scene = check.Scene("circle", "red", "white", "small", "centre")
    between = np.roll(check.draw_scene(scene), 10, axis=(0, 1))
    reading = check.read_image(between)
    assert (reading.shape, reading.place) == ("circle", None)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.float32)],
)
def test_another_kind_of_array_is_refused(pixels):
    with pytest.raises(ValueError, match=r"expected uint8 \[64, 64, 3\]"):
        check.read_image(pixels)


def test_scenes_of_a_check_are_the_same_for_the_same_seed():
    assert check.sample_scenes(5, seed=1) == SCENES[:5]
    assert check.sample_scenes(60, seed=2) != SCENES
    assert all(scene.colour != scene.ground for scene in SCENES)


def test_shares_are_counted_by_attribute():
    right = check.Verdict(shape=True, colour=True, ground=True, size=True, place=True)
    shares = check.count_right([right, replace(right, place=False)])
    assert shares["place"] == shares["everything"] == 0.5
    assert shares["shape"] == shares["colour"] == shares["ground"] == shares["size"] == 1.0
