"""The report's grid of pictures: what each candidate drew, beside its difference from torch, small enough to send."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdopt.bench.case.candidates import ENGINES, Baseline
from sdopt.bench.case.report import CandidateRecord
from sdopt.bench.page.summary import shorten
from sdopt.bench.run import BenchResult
from sdopt.bundle.records import ImageFidelity
from sdopt.fidelity.drawings import Drawing
from sdopt.fidelity.metrics import PictureFault, find_fault, map_difference, to_picture

MOST_PROMPTS = 6
DIFFERENCE_GAIN = 10
_PROMPT_SHOWN_CHARS = 160
# Base64 of all pictures together: with the rest of the page they stay under 5 MB.
_BUDGET_BYTES = 3_600_000
# Small pictures are kept exactly, as long as they fit.
LOSSLESS_UP_TO_PX = 160
_SIZES = ((512, 85), (384, 82), (320, 80), (256, 75), (192, 70), (128, 60), (96, 50), (64, 40))


@dataclass(frozen=True)
class Tile:
    """A picture of the grid: data URIs, and its figures against torch fp32 (None for torch itself)."""

    label: str
    is_engines: bool
    picture: str
    difference: str
    fidelity: ImageFidelity | None
    fault: PictureFault | None


@dataclass(frozen=True)
class Row:
    """One prompt and a tile for each candidate. `shown` is the prompt, shortened."""

    prompt: str
    shown: str
    seed: int
    tiles: tuple[Tile, ...]


def lay_out_grid(result: BenchResult) -> list[Row]:
    """The first prompts, and for each a tile of every candidate that drew; empty where nothing was drawn."""
    case = result.report.case
    prompts = case.prompts[:MOST_PROMPTS]
    columns = _list_columns(result)
    limit_bytes = _BUDGET_BYTES // max(1, len(prompts) * (2 * len(columns) - 1))
    return [
        Row(prompt, shorten(prompt, _PROMPT_SHOWN_CHARS) or "(an empty prompt)", case.seed + index, tiles)
        for index, prompt in enumerate(prompts)
        if (tiles := tuple(_make_tile(c, drawing, result.reference, index, limit_bytes) for c, drawing in columns))
    ]


def _list_columns(result: BenchResult) -> Sequence[tuple[CandidateRecord | None, Drawing]]:
    """Candidates and their drawings; None is torch fp32 where it drew the reference and is not a candidate."""
    drawn = [(each, result.drawings[each.name]) for each in result.report.candidates if each.name in result.drawings]
    if result.reference is None or any(candidate.name == Baseline.EAGER_FP32 for candidate, _ in drawn):
        return drawn
    return [(None, result.reference), *drawn]


def _make_tile(
    candidate: CandidateRecord | None, drawing: Drawing, reference: Drawing | None, index: int, limit_bytes: int
) -> Tile:
    image = drawing.images[index]
    picture = to_picture(image)
    difference, fidelity = "", None
    if reference is not None and reference is not drawing and candidate is not None:
        gained = map_difference(to_picture(reference.images[index]), picture, DIFFERENCE_GAIN)
        difference = encode_picture(gained, limit_bytes)
        fidelity = candidate.fidelity[index] if candidate.fidelity else None
    label = candidate.label if candidate else "torch eager fp32"
    is_engines = candidate is not None and candidate.name == ENGINES
    return Tile(label, is_engines, encode_picture(picture, limit_bytes), difference, fidelity, find_fault(image))


def encode_picture(picture: np.ndarray, limit_bytes: int = 200_000) -> str:
    """uint8 RGB as a WebP data URI of at most `limit_bytes`: exact when small, else as large and as good as fits."""
    image = Image.fromarray(picture)
    if max(image.size) <= LOSSLESS_UP_TO_PX:
        uri = _to_uri(image, lossless=True)
        if len(uri) <= limit_bytes:
            return uri
    for side_px, quality in _SIZES:
        smaller = image.copy()
        smaller.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
        uri = _to_uri(smaller, quality=quality)
        if len(uri) <= limit_bytes:
            break
    return uri


def _to_uri(image: Image.Image, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
