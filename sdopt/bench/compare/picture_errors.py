"""The pictures of a bench: every candidate's against torch fp32's, by all figures that this machine has weights for.

A figure whose weights are no use is not measured, and the report says why: the times that were taken are not lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdopt import progress
from sdopt.bench.case.report import PictureRecord
from sdopt.errors import SdoptError
from sdopt.fidelity.colour import measure_colour_error
from sdopt.fidelity.compare_drawings import compare_drawings
from sdopt.fidelity.drawings import Drawing
from sdopt.fidelity.metrics import compute_cosines, to_picture
from sdopt.fidelity.perceptual.local_weights import (
    NOT_MEASURED,
    PerceptualWeights,
    describe_failure,
    describe_weights,
    list_clip_files,
    read_tensors,
)
from sdopt.fidelity.scene import Scene

if TYPE_CHECKING:
    from sdopt.fidelity.perceptual.clip import Clip

LPIPS, CLIP_SCORE, FID = "LPIPS", "CLIP score", "FID"


@dataclass(frozen=True)
class PictureFigures:
    """By candidate: its pictures' records, and its FID against torch fp32's pictures, null where it has none.

    `plugins` says of LPIPS, CLIP score and FID what they were measured with, or why they were not.
    """

    pictures: Mapping[str, tuple[PictureRecord, ...]]
    fid: Mapping[str, float | None]
    plugins: Mapping[str, str]


@dataclass
class _Perceived:
    """What the networks say: by candidate a figure for each picture, None where it has NaN."""

    lpips: dict[str, list[float | None]] = field(default_factory=dict)
    clip_score: dict[str, list[float | None]] = field(default_factory=dict)
    fid: dict[str, float | None] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=lambda: dict.fromkeys((LPIPS, CLIP_SCORE, FID), NOT_MEASURED))


def compare_candidates(
    scene: Scene,
    reference: Drawing | None,
    floor: Drawing | None,
    drawings: Mapping[str, Drawing],
    perceptual: PerceptualWeights,
) -> PictureFigures:
    """Compare what each candidate drew of `scene` with what torch fp32 drew, `reference`, and drew again, `floor`.

    Without one of these nothing can be said, and the tables are empty. Every figure is finite or None.
    """
    if reference is None or floor is None:
        reason = "not measured (torch fp32 drew no pictures)"
        return PictureFigures({}, {}, dict.fromkeys((LPIPS, CLIP_SCORE, FID), reason))
    progress.update("comparing the pictures", 0.0)
    seen = _Perceived()
    _measure_lpips(reference, drawings, perceptual, seen)
    _measure_clip(scene, reference, drawings, perceptual, seen)
    pictures = {name: _compare(scene, reference, floor, name, drawing, seen) for name, drawing in drawings.items()}
    return PictureFigures(pictures, {name: seen.fid.get(name) for name in drawings}, seen.plugins)


def _compare(
    scene: Scene, reference: Drawing, floor: Drawing, name: str, drawing: Drawing, seen: _Perceived
) -> tuple[PictureRecord, ...]:
    records = []
    for index, image in enumerate(compare_drawings(scene, reference, drawing, floor)):
        colour = None
        if _is_finite(reference, index) and _is_finite(drawing, index):
            colour = measure_colour_error(to_picture(reference.images[index]), to_picture(drawing.images[index]))
        records.append(
            PictureRecord(
                **image.model_dump(),
                latent_cosines=tuple(compute_cosines(reference.latents[index], drawing.latents[index])),
                ciede2000_mean=None if colour is None else colour.mean,
                ciede2000_p99=None if colour is None else colour.p99,
                lpips=seen.lpips[name][index] if name in seen.lpips else None,
                clip_score=seen.clip_score[name][index] if name in seen.clip_score else None,
            )
        )
    return tuple(records)


def _is_finite(drawing: Drawing, index: int) -> bool:
    return bool(np.isfinite(drawing.images[index]).all())


def _measure_lpips(
    reference: Drawing, drawings: Mapping[str, Drawing], perceptual: PerceptualWeights, seen: _Perceived
) -> None:
    if not perceptual.lpips:
        return
    from sdopt.fidelity.perceptual.lpips import Lpips

    try:
        lpips = Lpips(read_tensors(perceptual.lpips))
    except SdoptError as error:
        seen.plugins[LPIPS] = describe_failure(error)
        return
    for name, drawing in drawings.items():
        progress.update(f"LPIPS of {name}", 0.5)
        seen.lpips[name] = [
            lpips.compare(to_picture(reference.images[index]), to_picture(drawing.images[index]))
            if _is_finite(reference, index) and _is_finite(drawing, index)
            else None
            for index in range(len(drawing.images))
        ]
    seen.plugins[LPIPS] = f"measured on {lpips.network} features with {describe_weights(perceptual.lpips)}"


def _measure_clip(
    scene: Scene, reference: Drawing, drawings: Mapping[str, Drawing], perceptual: PerceptualWeights, seen: _Perceived
) -> None:
    """CLIP score, and FID over the same features."""
    if perceptual.clip is None:
        return
    from sdopt.fidelity.perceptual.clip import Clip

    try:
        clip = Clip(perceptual.clip)
    except SdoptError as error:
        seen.plugins |= dict.fromkeys((CLIP_SCORE, FID), describe_failure(error))
        return
    progress.update("CLIP looks at the pictures", 0.5)
    prompts = clip.find_text_features(scene.prompts)
    features = {name: _find_features(clip, drawing) for name, drawing in drawings.items()}
    for name, rows in features.items():
        seen.clip_score[name] = [
            None if row is None else float(100 * row @ prompt) for row, prompt in zip(rows, prompts, strict=True)
        ]
    weights = f"{perceptual.clip.name}/{describe_weights(list_clip_files(perceptual.clip))}"
    seen.plugins[CLIP_SCORE] = f"measured with {weights}"
    seen.plugins[FID] = _measure_fid(_find_features(clip, reference), features, seen, weights)


def _find_features(clip: Clip, drawing: Drawing) -> list[NDArray[np.float64] | None]:
    """Of each picture; None for one with NaN."""
    return [
        clip.find_features([to_picture(image)])[0] if np.isfinite(image).all() else None for image in drawing.images
    ]


def _measure_fid(
    reference: Sequence[NDArray[np.float64] | None],
    features: Mapping[str, Sequence[NDArray[np.float64] | None]],
    seen: _Perceived,
    weights: str,
) -> str:
    """Fill `seen.fid`; returns what the report says of it. A candidate that drew NaN has none."""
    from sdopt.fidelity.perceptual.frechet import LEAST_PICTURES, compute_frechet_distance

    count = len(reference)
    if count < LEAST_PICTURES:
        drawn_here = "1 picture is" if count == 1 else f"{count} pictures are"
        return f"not measured ({drawn_here} too few: {LEAST_PICTURES} at least)"
    expected = [row for row in reference if row is not None]
    if len(expected) < count:
        return "not measured (torch fp32 drew NaN)"
    for name, rows in features.items():
        drawn = [row for row in rows if row is not None]
        if len(drawn) == count:
            seen.fid[name] = compute_frechet_distance(np.stack(expected), np.stack(drawn))
    return f"measured over CLIP features of {count} pictures, not over Inception's, with {weights}"
