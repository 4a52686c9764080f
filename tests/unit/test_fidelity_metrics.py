"""The figures of fidelity against formulas, and against planted faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.fidelity.metrics import (
    PictureFault,
    choose_scales,
    compute_least_cosine,
    compute_ms_ssim,
    compute_psnr,
    compute_ssim,
    find_fault,
    map_difference,
    to_picture,
)


def paint(seed: int, side: int = 64) -> np.ndarray:
    """A picture with edges and a gradient, mid-grey enough that small shifts do not clip."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.stack([100 + 40 * x, 120 + 30 * y, 110 + 20 * x * y], axis=-1)
    image[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] = rng.uniform(80, 180, 3)
    return (image + rng.normal(0, 3, image.shape)).astype(np.uint8)


@given(st.integers(0, 50), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_brightness_shift_lowers_psnr_by_the_formula(seed: int, shift: int) -> None:
    picture = paint(seed)
    assert picture.max() + shift <= 255
    assert compute_psnr(picture, picture + np.uint8(shift)) == pytest.approx(20 * math.log10(255 / shift))


@given(st.integers(0, 50), st.integers(51, 100))
@settings(max_examples=10, deadline=None)
def test_metrics_are_symmetric(seed: int, other: int) -> None:
    a, b = paint(seed), paint(other)
    assert compute_psnr(a, b) == compute_psnr(b, a)
    assert compute_ssim(a, b) == pytest.approx(compute_ssim(b, a), abs=1e-9)
    assert compute_ms_ssim(a, b) == pytest.approx(compute_ms_ssim(b, a), abs=1e-9)


def test_equal_pictures_are_perfect() -> None:
    picture = paint(3)
    assert compute_psnr(picture, picture.copy()) == math.inf
    assert compute_ssim(picture, picture) == pytest.approx(1)
    assert compute_ms_ssim(picture, picture) == pytest.approx(1)
    assert not map_difference(picture, picture, gain=10).any()


def test_more_noise_scores_less() -> None:
    picture, rng = paint(1).astype(float), np.random.default_rng(0)
    noise = rng.normal(size=picture.shape)
    noisy = [np.clip(picture + noise * std, 0, 255).astype(np.uint8) for std in (2, 8, 32)]
    for metric in (compute_psnr, compute_ssim, compute_ms_ssim):
        scores = [metric(paint(1), other) for other in noisy]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > scores[-1]


def test_opposite_pictures_score_zero_and_not_less() -> None:
    picture = np.indices((64, 64)).sum(axis=0)[..., None].repeat(3, 2) % 2 * 255
    picture = picture.astype(np.uint8)
    assert compute_ssim(picture, 255 - picture) == 0
    assert compute_ms_ssim(picture, 255 - picture) < 0.05


@pytest.mark.parametrize(("side_px", "scales"), [(16, 1), (32, 2), (64, 3), (104, 4), (175, 4), (176, 5), (1024, 5)])
def test_scales_fit_the_picture(side_px: int, scales: int) -> None:
    weights = choose_scales(side_px)
    assert len(weights) == scales
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("side_px", [16, 32, 48, 64, 96, 104, 176])
def test_every_chosen_scale_count_is_accepted(side_px: int) -> None:
    assert 0 < compute_ms_ssim(paint(0, side_px), paint(1, side_px)) <= 1


def test_faults_are_told_apart() -> None:
    picture = paint(0) / np.float32(255)
    broken = picture.copy()
    broken[0, 0, 0] = np.nan
    assert find_fault(picture) is None
    assert find_fault(broken) is PictureFault.NOT_FINITE
    assert find_fault(np.zeros_like(picture)) is PictureFault.BLACK
    assert find_fault(np.full_like(picture, 0.6)) is PictureFault.FLAT
    assert find_fault(np.full_like(picture, (0.9, 0.2, 0.1))) is PictureFault.FLAT


def test_a_dim_picture_is_no_fault() -> None:
    assert find_fault((paint(0) / np.float32(255) - 0.4) * 0.1) is None


def test_nan_becomes_a_writable_pixel() -> None:
    image = np.array([[[np.nan, np.inf, 0.5]]], dtype=np.float32)
    assert to_picture(image).tolist() == [[[0, 255, 128]]]


def test_least_cosine_is_that_of_the_worst_step() -> None:
    a = np.random.default_rng(0).normal(size=(4, 4, 8, 8))
    b = a.copy()
    b[2] = -b[2]
    assert compute_least_cosine(a, a) == pytest.approx(1)
    assert compute_least_cosine(a, b) == pytest.approx(-1)
    b[1, 0, 0, 0] = np.inf
    assert compute_least_cosine(a, b) == 0


def test_difference_map_is_scaled_and_clipped() -> None:
    a = np.zeros((1, 2, 3), np.uint8)
    b = np.array([[[5, 0, 30], [1, 2, 3]]], np.uint8)
    assert map_difference(a, b, gain=10).tolist() == [[[50, 0, 255], [10, 20, 30]]]
    assert (map_difference(b, a, gain=10) == map_difference(a, b, gain=10)).all()
