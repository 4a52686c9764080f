"""The figures of pictures in a bench: finite or null, and each where its weights are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdopt.bench.compare.picture_errors import CLIP_SCORE, FID, LPIPS, compare_candidates
from sdopt.fidelity.drawings import Drawing
from sdopt.fidelity.perceptual.local_weights import NOT_MEASURED, PerceptualWeights
from sdopt.fidelity.scene import Scene, paint_image
from tests.planted_weights import write_clip, write_lpips


def _draw(count: int, spread: float = 0.0) -> Drawing:
    rng = np.random.default_rng(7)
    images = np.stack([paint_image(64, 64, seed) / 255 for seed in range(count)])
    latents = np.stack([np.random.default_rng(seed).normal(size=(3, 4, 8, 8)) for seed in range(count)])
    images = np.clip(images + rng.normal(0, spread, images.shape), 0, 1).astype(np.float32)
    return Drawing(images, (latents + rng.normal(0, spread, latents.shape)).astype(np.float32), "DDIM")


def _scene(count: int) -> Scene:
    prompts = tuple(f"a {chr(97 + i)}" for i in range(count))
    return Scene(prompts=prompts, seed=0, steps=3, guidance_scale=5.0, inputs=Path("inputs.safetensors"))


def _compare(count: int, candidates: dict[str, Drawing], weights: PerceptualWeights = PerceptualWeights()):  # type: ignore[no-untyped-def]  # noqa: B008
    return compare_candidates(_scene(count), _draw(count), _draw(count), candidates, weights)


def test_equal_pictures() -> None:
    (record, _) = _compare(2, {"engines": _draw(2)}).pictures["engines"]
    assert record.psnr_db is None
    assert record.ciede2000_mean == record.ciede2000_p99 == 0
    assert record.latent_cosines == pytest.approx((1, 1, 1))


def test_colour_and_latents_follow_the_error() -> None:
    figures = _compare(1, {"near": _draw(1, 0.01), "far": _draw(1, 0.1)}).pictures
    (near,), (far,) = figures["near"], figures["far"]
    assert 0 < near.ciede2000_mean < far.ciede2000_mean < far.ciede2000_p99
    assert near.latent_cosine_min == min(near.latent_cosines) > min(far.latent_cosines)


def test_nan_gives_null_or_0_and_never_nan(tmp_path: Path) -> None:
    broken = _draw(2)
    broken.images[0, 3, 4] = np.nan
    broken.latents[0, 1] = np.inf
    weights = PerceptualWeights((write_lpips(tmp_path / "alex.safetensors"),), write_clip(tmp_path / "clip"))
    spoilt, sound = _compare(2, {"engines": broken}, weights).pictures["engines"]
    assert (spoilt.psnr_db, spoilt.ciede2000_mean, spoilt.ciede2000_p99) == (0, None, None)
    assert (spoilt.lpips, spoilt.clip_score) == (None, None)
    assert spoilt.latent_cosines == pytest.approx((1, 0, 1))
    assert sound.lpips == 0
    assert sound.clip_score is not None
    assert "NaN" not in json.dumps(spoilt.model_dump(mode="json"))


def test_without_weights_nothing_is_measured() -> None:
    figures = _compare(1, {"engines": _draw(1)})
    assert figures.plugins == {LPIPS: NOT_MEASURED, CLIP_SCORE: NOT_MEASURED, FID: NOT_MEASURED}
    (record,) = figures.pictures["engines"]
    assert (record.lpips, record.clip_score, figures.fid["engines"]) == (None, None, None)


def test_with_weights_the_report_says_with_which(tmp_path: Path) -> None:
    weights = PerceptualWeights((write_lpips(tmp_path / "alex.safetensors"),), write_clip(tmp_path / "clip"))
    drawings = {"same": _draw(10), "near": _draw(10, 0.02), "far": _draw(10, 0.3)}
    figures = _compare(10, drawings, weights)
    assert figures.plugins[LPIPS].startswith("measured on AlexNet features with alex.safetensors, SHA-256 ")
    assert figures.plugins[CLIP_SCORE].startswith("measured with clip/model.safetensors, SHA-256 ")
    assert "CLIP features of 10 pictures" in figures.plugins[FID]
    assert figures.fid["same"] == pytest.approx(0, abs=1e-9)
    assert figures.fid["same"] < figures.fid["near"] < figures.fid["far"]
    assert figures.pictures["same"][0].lpips == 0 < figures.pictures["near"][0].lpips


def test_few_pictures_have_no_fid(tmp_path: Path) -> None:
    figures = _compare(2, {"engines": _draw(2)}, PerceptualWeights(clip=write_clip(tmp_path)))
    assert figures.plugins[FID] == "not measured (2 pictures are too few: 10 at least)"
    assert figures.fid == {"engines": None}


def test_weights_that_are_no_use_do_not_end_the_run(tmp_path: Path) -> None:
    bad = write_lpips(tmp_path / "alex.safetensors", rename=("lin0.model.1.weight", "lin0.weight"))
    figures = _compare(1, {"engines": _draw(1)}, PerceptualWeights(lpips=(bad,)))
    assert figures.plugins[LPIPS].startswith("not measured: the weights of LPIPS lack the tensor 'lin0.model.1.weight'")
    assert figures.pictures["engines"][0].lpips is None


def test_without_a_reference_nothing_is_said() -> None:
    figures = compare_candidates(_scene(1), None, None, {"engines": _draw(1)}, PerceptualWeights())
    assert not figures.pictures
    assert set(figures.plugins.values()) == {"not measured (torch fp32 drew no pictures)"}
