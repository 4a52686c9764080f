"""Sizes: which pictures a profile takes, which it refuses, and what the refusal offers instead."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.errors import ShapeError
from sdopt.model.shape import (
    Extent,
    ShapeProfile,
    describe_profiles,
    nearest_profile,
    parse_size,
    parse_sizes,
    write_size,
)

sides = st.integers(1, 99_999)


@given(sides, sides)
def test_a_size_is_width_by_height(width: int, height: int) -> None:
    assert parse_size(f" {width}X{height} ") == (width, height)


@pytest.mark.parametrize(
    "text",
    ["", "512", "512x", "x512", "-512x512", "512x512x3", "1e3x5", "512,512", "0x512", "512x0", "100000x8", "512 x 512",
     "512x512\n8"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ShapeError):
        parse_size(text)


@given(st.tuples(*[st.integers(-3, 50)] * 3))
def test_an_extent_is_ordered_and_positive_or_refused(bounds: tuple[int, int, int]) -> None:
    low, usual, high = bounds
    if 1 <= low <= usual <= high:
        extent = Extent(*bounds)
        assert [size for size in range(-5, 60) if size in extent] == list(range(low, high + 1))
        assert extent.is_static == (low == usual == high)
    else:
        with pytest.raises(ShapeError):
            Extent(*bounds)


@given(sides, sides, st.sampled_from([8, 16, 32, 64]))
def test_sizes_that_are_no_multiple_are_refused_with_the_nearest_that_are(width: int, height: int, unit: int) -> None:
    profile = ShapeProfile.static(height_px=height, width_px=width)
    if width % unit == 0 and height % unit == 0:
        profile.check_against(unit)
        return
    with pytest.raises(ShapeError, match=rf"multiples? of {unit}, ") as caught:
        profile.check_against(unit)
    for side, size in (("width", width), ("height", height)):
        assert (f"the {side} of {size} px" in caught.value.message) == bool(size % unit)
        (hints,) = [part for part in caught.value.hint.split("; ") if side in part] or [""]
        low = size // unit * unit
        nearest = [low, low + unit] if low else [unit]
        assert list(map(int, re.findall(r"\d+", hints))) == (nearest if size % unit else [])


def test_both_wrong_sides_are_named_in_one_sentence() -> None:
    with pytest.raises(ShapeError) as caught:
        ShapeProfile.static(height_px=7, width_px=40).check_against(16)
    assert caught.value.message == (
        "the width of 40 px and the height of 7 px are not multiples of 16, which this model needs"
    )
    assert caught.value.hint == "the nearest widths are 32 and 48; the least height is 16"


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 200), st.sampled_from([4, 8]))
def test_axes_agree_with_each_other(batch: int, height: int, width: int, factor: int) -> None:
    axes = ShapeProfile.static(height_px=height * factor, width_px=width * factor, batch=batch).axis_extents(factor)
    assert axes["cfg_batch"].opt == 2 * axes["batch"].opt
    assert axes["latent_height"].opt * factor == axes["height"].opt
    assert axes["latent_width"].opt * factor == axes["width"].opt


def test_only_a_profile_without_a_range_is_static() -> None:
    fixed, span = Extent.static(64), Extent(64, 64, 128)
    assert ShapeProfile(fixed, fixed, fixed).is_static
    assert not ShapeProfile(span, fixed, fixed).is_static
    assert not ShapeProfile(fixed, fixed, span).is_static


sizes = st.tuples(sides, sides)


def in_words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@given(st.lists(sizes, min_size=1, max_size=4, unique=True), sizes)
def test_several_sizes_are_as_many_static_profiles(written: list[tuple[int, int]], usual: tuple[int, int]) -> None:
    parsed = parse_sizes(", ".join(map(in_words, written)), usual)
    assert parsed == tuple((Extent.static(width), Extent.static(height)) for width, height in written)
    assert [write_size(*each) for each in parsed] == [in_words(size) for size in written]
    with pytest.raises(ShapeError, match="twice"):
        parse_sizes(",".join(map(in_words, [*written, written[0]])), usual)


@given(st.lists(sides, min_size=3, max_size=3), st.lists(sides, min_size=3, max_size=3), sizes)
def test_a_range_has_the_models_own_size_as_its_usual_one_where_that_lies_inside(
    widths: list[int], heights: list[int], usual: tuple[int, int]
) -> None:
    least, middle, most = zip(sorted(widths), sorted(heights), strict=True)
    ((width, height),) = parse_sizes(f"{in_words(least)}..{in_words(most)}", usual)
    assert (width.min, height.min, width.max, height.max) == (*least, *most)
    inside = usual[0] in width and usual[1] in height
    assert (width.opt, height.opt) == (usual if inside else most)
    written = "..".join(map(in_words, (least, middle, most)))
    assert parse_sizes(written, usual) == ((Extent(*sorted(widths)), Extent(*sorted(heights))),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1024x1024..512x512", "smallest to the largest"),
        ("512x1024..1024x512", "smallest to the largest"),
        ("512x512..256x256..1024x1024", "smallest to the largest"),
        ("64x64..65x65..66x66..67x67", "too many bounds"),
        ("64X64,64x64", "twice"),
        ("64x64..64x64,64x64", "twice"),
        ("64x64,", "is not WIDTHxHEIGHT"),
        ("64x64...128x128", "is not WIDTHxHEIGHT"),
        ("64x64..", "is not WIDTHxHEIGHT"),
        ("64", "is not WIDTHxHEIGHT"),
    ],
)
def test_what_is_no_set_of_sizes_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ShapeError, match=reason):
        parse_sizes(text, (512, 512))


def table(width: int, height: int) -> dict[str, Extent]:
    return {"width": Extent.static(width), "height": Extent.static(height)}


@given(st.lists(sizes, min_size=1, max_size=5), sizes)
def test_the_nearest_profile_is_the_one_that_takes_it_and_the_first_of_equals(
    built: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    profiles = [table(*size) for size in built]
    near = nearest_profile(profiles, {"width": asked[0], "height": asked[1]})
    assert any(near is profile for profile in profiles)
    if asked in built:
        assert near is profiles[built.index(asked)]
    again = nearest_profile([near, *profiles], {"width": asked[0], "height": asked[1]})
    assert again is near


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ((640, 512), (512, 512)), ((640, 640), (768, 768)), ((1024, 512), (1024, 512)), ((960, 544), (1024, 512)),
        ((16, 16), (512, 512)), ((4096, 4096), (768, 768)), ((2048, 1024), (1024, 512)),
    ],
)  # fmt: skip
def test_nearness_is_of_area_and_aspect(asked: tuple[int, int], nearest: tuple[int, int]) -> None:
    profiles = [table(512, 512), table(768, 768), table(1024, 512)]
    assert nearest_profile(profiles, {"width": asked[0], "height": asked[1]}) == table(*nearest)


def test_a_range_is_as_near_as_its_nearest_size() -> None:
    span = {"width": Extent(256, 512, 1024), "height": Extent(256, 512, 1024)}
    assert nearest_profile([table(1088, 1088), span], {"width": 640, "height": 900}) is span
    assert nearest_profile([table(1088, 1088), span], {"width": 1088, "height": 1080}) == table(1088, 1088)


def test_profiles_are_described_with_every_size_and_prompt_length() -> None:
    wide = ShapeProfile.static(width_px=768, height_px=512)
    tokens = Extent(77, 77, 231)
    span = ShapeProfile(Extent(1, 1, 4), Extent(256, 512, 512), Extent(256, 512, 768), tokens)
    assert describe_profiles([wide]) == "768x512 px, batch 1, prompts of 77 tokens"
    assert describe_profiles([span]) == "256x256..768x512 px, batch 1 to 4, prompts of 77 or 154 or 231 tokens"
    both = ShapeProfile.covering([wide, ShapeProfile.static(width_px=64, height_px=64)])
    assert (both.width_px, both.height_px) == (Extent(64, 768, 768), Extent(64, 512, 512))
