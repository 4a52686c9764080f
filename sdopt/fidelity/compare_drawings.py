"""Figures of what two candidates drew of one scene."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdopt.bundle.records import ImageFidelity
from sdopt.fidelity.drawings import Drawing, read_drawing
from sdopt.fidelity.metrics import (
    compute_least_cosine,
    compute_ms_ssim,
    compute_psnr,
    compute_ssim,
    to_picture,
)
from sdopt.fidelity.scene import Scene
from sdopt.processes.call import call


def compare_drawings(
    scene: Scene, reference: Drawing, other: Drawing, floor: Drawing | None = None
) -> tuple[ImageFidelity, ...]:
    """Figures of each picture of `other` against `reference`, beside those of the noise floor.

    A picture with NaN or Inf scores 0 everywhere. Without a floor, its columns say "equal".
    """
    records = []
    for index, prompt in enumerate(scene.prompts):
        psnr_db, ssim = _score(reference, other, index)
        floor_psnr_db, floor_ssim = (None, 1.0) if floor is None else _score(reference, floor, index)
        a, b = to_picture(reference.images[index]), to_picture(other.images[index])
        finite = bool(np.isfinite(other.images[index]).all())
        records.append(
            ImageFidelity(
                prompt=prompt,
                seed=scene.seed_of(index),
                psnr_db=psnr_db,
                ssim=ssim,
                ms_ssim=compute_ms_ssim(a, b) if finite else 0.0,
                latent_cosine_min=compute_least_cosine(reference.latents[index], other.latents[index]),
                noise_floor_psnr_db=floor_psnr_db,
                noise_floor_ssim=floor_ssim,
            )
        )
    return tuple(records)


def _score(reference: Drawing, other: Drawing, index: int) -> tuple[float | None, float]:
    """(PSNR in dB or None for equal pictures, SSIM)."""
    if not np.isfinite(other.images[index]).all():
        return 0.0, 0.0
    a, b = to_picture(reference.images[index]), to_picture(other.images[index])
    psnr_db = compute_psnr(a, b)
    return (None if math.isinf(psnr_db) else psnr_db), compute_ssim(a, b)


def format_psnr(psnr_db: float | None) -> str:
    return "∞ dB" if psnr_db is None or math.isinf(psnr_db) else f"{psnr_db:.1f} dB"


@dataclass(frozen=True)
class CompareJob:
    scene: Scene
    reference: Path
    other: Path
    floor: Path | None


def compare_apart(
    scene: Scene, reference: Drawing, other: Drawing, floor: Drawing | None = None
) -> tuple[ImageFidelity, ...]:
    """`compare_drawings`, by a child where every drawing is a file: what computes MS-SSIM loads for seconds."""
    if reference.file is None or other.file is None or (floor is not None and floor.file is None):
        return compare_drawings(scene, reference, other, floor)
    job = CompareJob(scene, reference.file, other.file, None if floor is None else floor.file)
    return call(compare_in_child, job).value


def compare_in_child(job: CompareJob) -> tuple[ImageFidelity, ...]:
    floor = None if job.floor is None else read_drawing(job.floor)
    return compare_drawings(job.scene, read_drawing(job.reference), read_drawing(job.other), floor)
