"""Sizes: which pictures a profile takes, which it refuses, and what the refusal offers instead."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.errors import ShapeError
from sdopt.model.shape import Extent, ShapeProfile, parse_size

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
    with pytest.raises(ShapeError, match=f"multiple of {unit}") as caught:
        profile.check_against(unit)
    wrong = height if height % unit else width
    offered = [int(number) for number in re.findall(r"\d+", caught.value.hint)]
    assert all(size > 0 and size % unit == 0 and abs(size - wrong) < unit for size in offered)
    assert any(size <= wrong for size in offered) or wrong < unit


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
