"""How far apart two pictures are in colour, as an eye sees it: CIEDE2000, pixel by pixel. Pure functions on arrays.

The formulas are those of Sharma, Wu and Dalal, "The CIEDE2000 Color-Difference Formula: Implementation Notes,
Supplementary Test Data, and Mathematical Observations", Color Research and Application 30(1), 2005, with all three
weights 1. sRGB is IEC 61966-2-1 with its white, D65.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdopt.fidelity.metrics import Picture

Lab = NDArray[np.float64]

# Rows give X, Y and Z of linear sRGB: IEC 61966-2-1. A row's sum is the white's.
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(axis=1)
_CUBE, _SLOPE = (6 / 29) ** 3, (29 / 6) ** 2 / 3
_25_TO_7 = 25.0**7


@dataclass(frozen=True)
class ColourError:
    """Mean and 99th percentile of CIEDE2000 over the pixels of a picture; a difference of about 1 can just be seen."""

    mean: float
    p99: float


def measure_colour_error(a: Picture, b: Picture) -> ColourError:
    difference = compute_ciede2000(to_lab(a), to_lab(b))
    return ColourError(float(difference.mean()), float(np.percentile(difference, 99)))


def to_lab(picture: Picture) -> Lab:
    """CIE L*a*b* of an sRGB picture, (..., 3) uint8."""
    encoded = np.arange(256) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    relative = linear[picture] @ _TO_XYZ.T / _WHITE
    f = np.where(relative > _CUBE, np.cbrt(relative), _SLOPE * relative + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def compute_ciede2000(a: Lab, b: Lab) -> NDArray[np.float64]:
    """Colour difference of two arrays of L*a*b*, (..., 3)."""
    lightness_a, lightness_b = a[..., 0], b[..., 0]
    chroma_a, hue_a, chroma_b, hue_b = _find_chroma_and_hue(a, b)
    chroma_product = chroma_a * chroma_b
    turn = _turn_between(hue_a, hue_b, chroma_product)
    hue_difference = 2 * np.sqrt(chroma_product) * np.sin(np.radians(turn / 2))
    lightness = (lightness_a + lightness_b) / 2
    chroma = (chroma_a + chroma_b) / 2
    hue = _mean_hue(hue_a, hue_b, chroma_product)
    off_grey = (lightness - 50) ** 2
    weight = (
        1 - 0.17 * _cos(hue - 30) + 0.24 * _cos(2 * hue) + 0.32 * _cos(3 * hue + 6) - 0.20 * _cos(4 * hue - 63)
    )  # fmt: skip
    by_lightness = (lightness_b - lightness_a) / (1 + 0.015 * off_grey / np.sqrt(20 + off_grey))
    by_chroma = (chroma_b - chroma_a) / (1 + 0.045 * chroma)
    by_hue = hue_difference / (1 + 0.015 * chroma * weight)
    rotation = -np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2)))) * 2 * _saturate(chroma)
    squared = by_lightness**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue
    return np.sqrt(np.maximum(squared, 0.0))  # type: ignore[no-any-return]


def _find_chroma_and_hue(a: Lab, b: Lab) -> tuple[Lab, Lab, Lab, Lab]:
    """C' and h' in degrees of both, after a* is stretched by their mean chroma."""
    mean = (np.hypot(a[..., 1], a[..., 2]) + np.hypot(b[..., 1], b[..., 2])) / 2
    stretch = 1 + 0.5 * (1 - _saturate(mean))
    found = []
    for lab in (a, b):
        red = stretch * lab[..., 1]
        found += [np.hypot(red, lab[..., 2]), np.degrees(np.arctan2(lab[..., 2], red)) % 360]
    return found[0], found[1], found[2], found[3]


def _saturate(chroma: Lab) -> Lab:
    power = chroma**7
    return np.sqrt(power / (power + _25_TO_7))


def _turn_between(hue_a: Lab, hue_b: Lab, chroma_product: Lab) -> Lab:
    """From hue to hue the short way, in degrees; 0 where either colour is grey and has no hue."""
    turn = hue_b - hue_a
    turn = np.where(turn > 180, turn - 360, np.where(turn < -180, turn + 360, turn))
    return np.where(chroma_product == 0, 0.0, turn)


def _mean_hue(hue_a: Lab, hue_b: Lab, chroma_product: Lab) -> Lab:
    total = hue_a + hue_b
    around = np.where(total < 360, total + 360, total - 360)
    mean = np.where(np.abs(hue_a - hue_b) <= 180, total, around) / 2
    return np.where(chroma_product == 0, total, mean)


def _cos(degrees: Lab) -> Lab:
    return np.cos(np.radians(degrees))
