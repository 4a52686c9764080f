"""How far apart two pictures are, and whether one is a picture at all. Pure functions on arrays.

A picture here is uint8 RGB of shape (height, width, 3), unless float is said. The SSIM family is
torchmetrics'.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
FloatArray = NDArray[np.floating[Any]]

# Weights of the scales, finest first: Wang, Simoncelli and Bovik, "Multi-scale structural similarity", 2003.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_SSIM_KERNEL_PX = 11

# A picture whose brightness stays within so little of its mean has nothing in it. The faintest picture that
# is one, fog or a plain wall with noise, spreads several times as far.
_FLAT_STD = 1.5 / 255
_BLACK_MEAN = 4 / 255


class PictureFault(StrEnum):
    """Why something is not a picture; the value completes the sentence "the picture …"."""

    NOT_FINITE = "has NaN or Inf in it"
    BLACK = "is black"
    FLAT = "is one flat colour"


def to_picture(image: FloatArray) -> Picture:
    """Float RGB in [0, 1] rounded to uint8. NaN becomes 0, as files cannot hold it."""
    finite = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    return (np.clip(finite, 0.0, 1.0) * 255).round().astype(np.uint8)


def find_fault(image: FloatArray) -> PictureFault | None:
    """What makes a float RGB image in [0, 1], (height, width, 3), no picture; None where it is one."""
    if not np.isfinite(image).all():
        return PictureFault.NOT_FINITE
    if float(image.std(axis=(0, 1)).max()) >= _FLAT_STD:
        return None
    return PictureFault.BLACK if float(image.mean()) < _BLACK_MEAN else PictureFault.FLAT


def compute_psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB, over all channels; infinity for equal pictures."""
    mean_square = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def compute_ssim(a: Picture, b: Picture) -> float:
    """Structural similarity in [0, 1], Gaussian window of 11 px. Below 0 (negatives of each other) is given
    as 0.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    return _unit(structural_similarity_index_measure(_tensor(a), _tensor(b), data_range=1.0))


def compute_ms_ssim(a: Picture, b: Picture) -> float:
    """Multi-scale SSIM in [0, 1].

    Five scales need 176 px; a smaller picture takes as many as its smaller side can hold (three at 64 px),
    with the published weights of these divided by their sum.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = choose_scales(min(a.shape[:2]))
    return _unit(
        multiscale_structural_similarity_index_measure(
            _tensor(a), _tensor(b), data_range=1.0, betas=weights, normalize="relu"
        )
    )


def choose_scales(side_px: int) -> tuple[float, ...]:
    """Weights of the MS-SSIM scales that fit a picture whose smaller side is `side_px`; they sum to 1.

    The window must fit the coarsest scale, by the true size of that scale and by torchmetrics' own count of
    it.
    """
    count = 1
    while (
        count < len(_MS_SSIM_WEIGHTS)
        and side_px // 2**count >= _SSIM_KERNEL_PX
        and side_px // count**2 >= _SSIM_KERNEL_PX
    ):
        count += 1
    total = sum(_MS_SSIM_WEIGHTS[:count])
    return tuple(weight / total for weight in _MS_SSIM_WEIGHTS[:count])


def compute_least_cosine(a: FloatArray, b: FloatArray) -> float:
    """Least cosine of two trajectories, (steps, ...), over the steps; 0 where either is not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    return min(compute_cosines(a, b))


def compute_cosines(a: FloatArray, b: FloatArray) -> list[float]:
    """Cosine of two trajectories, (steps, ...), at each step; 0 where either is not finite there, or is 0."""
    rows_a, rows_b = (array.reshape(len(array), -1).astype(np.float64) for array in (a, b))
    finite = (np.isfinite(rows_a) & np.isfinite(rows_b)).all(axis=1, keepdims=True)
    rows_a, rows_b = (np.where(finite, rows, 0.0) for rows in (rows_a, rows_b))
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    cosines = np.divide((rows_a * rows_b).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)
    return [float(cosine) for cosine in np.clip(cosines, -1.0, 1.0)]


def map_difference(a: Picture, b: Picture, gain: int) -> Picture:
    """Absolute difference times `gain`, clipped: black where the pictures are equal."""
    difference: NDArray[np.int32] = np.abs(a.astype(np.int32) - b.astype(np.int32)) * gain
    return np.minimum(difference, 255).astype(np.uint8)


def _tensor(picture: Picture) -> Any:
    import torch

    return torch.from_numpy(picture.astype(np.float64) / 255).permute(2, 0, 1)[None]


def _unit(value: Any) -> float:
    number = float(value)
    return 0.0 if math.isnan(number) else min(1.0, max(0.0, number))
