"""The judge of `tiny-shapes` is right about pictures of known content and catches every planted fault."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.shapes_check import load_check

check = load_check()
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


@pytest.mark.parametrize("shape", check.SHAPES)
def test_a_line_has_the_shapes_edge_and_nothing_inside(shape):
    scene = check.Scene(shape, "red", "white", "large", "left")
    filled, line = check.draw_scene(scene), check.draw_scene(scene, line_px=3.5)
    assert check.measure_filling(filled, scene) > 0.99
    assert check.measure_filling(line, scene) < 0.01
    half = (filled.astype(int) + line) // 2
    assert check.measure_filling(half.astype(np.uint8), scene) == pytest.approx(0.5, abs=0.02)
    columns = [np.flatnonzero((picture != check.COLOURS["white"]).any(axis=(0, 2))) for picture in (filled, line)]
    assert (columns[0][[0, -1]] == columns[1][[0, -1]]).all(), "the line is not inside the shape's edge"


def test_a_shape_that_the_picture_cuts_has_no_line_along_the_cut(monkeypatch):
    monkeypatch.setitem(check.PLACES, "left", (0.1, 0.5))
    line = check.draw_scene(check.Scene("square", "red", "white", "large", "left"), line_px=3.5)
    assert (line[32, 0] == check.COLOURS["white"]).all()


def test_a_filling_needs_an_inside():
    scene = check.Scene("star", "red", "white", "small", "left")
    with pytest.raises(ValueError, match="small star"):
        check.measure_filling(check.draw_scene(scene), scene)


def test_a_palette_is_near_where_all_pixels_have_its_colours():
    scene = check.Scene("square", "white", "blue", "large", "left")
    distances = [
        check.measure_palette_distance(check.draw_scene(replace(scene, ground=ground)), ("white", "blue"))
        for ground in ("blue", "purple", "green")
    ]
    assert distances[0] < 5
    assert distances == sorted(distances)
    assert distances[1] > 30
