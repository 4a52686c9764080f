"""A report and its pictures to one self-contained HTML file: no script, no network, everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image

from sdopt.artifacts.manifest import ImageFidelity
from sdopt.bench.candidates import ENGINES, Baseline
from sdopt.bench.plots import STAGE_LABELS, plot_latency, plot_memory, plot_stages
from sdopt.bench.report import CandidateRecord, Stage, Status
from sdopt.bench.run import BenchResult
from sdopt.bench.summary import (
    agrees,
    describe_result,
    find_baseline,
    format_bytes,
    format_ns,
    format_speed,
    summarize_candidates,
)
from sdopt.errors import MissingDependency
from sdopt.fidelity.draw import Drawing
from sdopt.fidelity.metrics import PictureFault, find_fault, map_difference, to_picture
from sdopt.fidelity.verdict import format_psnr

try:
    import jinja2
    import markupsafe
except ImportError as error:
    raise MissingDependency.of("jinja2", extra="report") from error

_PROMPT_SHOWN_CHARS = 160
_MOST_PROMPTS = 6
_DIFFERENCE_GAIN = 10
_SIDE_SHOWN_PX = 512
# Small pictures are kept exactly; of large ones 15 have to fit into a few MB.
_LOSSLESS_UP_TO_PX = 160


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


def render_html(result: BenchResult) -> str:
    """The whole page. Raises `MissingDependency` (extra `report`) without Jinja2 or matplotlib."""
    report = result.report
    rows = summarize_candidates(report)
    measured = [row for row in rows if row.whole]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(ns=format_ns, size=format_bytes, speed=format_speed, psnr=format_psnr, shorten=shorten)
    plots = [plot(measured) for plot in (plot_latency, plot_stages, plot_memory)] if measured else []
    template = environment.from_string(files("sdopt.bench").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        report=report,
        summary=describe_result(report),
        rows=rows,
        stages=[(stage, _name_stage(stage)) for stage in Stage if any(stage in row.stages for row in rows)],
        baseline=baseline.label if (baseline := find_baseline(report)) else "torch eager fp32",
        on_gpu=any(row.peak_device_bytes is not None for row in rows),
        on_gpu_by_torch=any(row.torch_peak_device_bytes is not None for row in rows),
        device_memory=any(row.device_memory for row in rows),
        end_to_end=Stage.END_TO_END,
        ok=Status.OK,
        engines=ENGINES,
        agrees=lambda record: agrees(report, record),
        plots=[markupsafe.Markup(plot) for plot in plots],  # noqa: S704 - made by matplotlib, which escapes its text
        grid=_lay_out_grid(result),
        prompts_left_out=max(0, len(report.case.prompts) - _MOST_PROMPTS),
        gain=_DIFFERENCE_GAIN,
        pixelated=max(report.case.width_px, report.case.height_px) <= _LOSSLESS_UP_TO_PX,
    )


def shorten(text: str, limit: int = _PROMPT_SHOWN_CHARS) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _name_stage(stage: Stage) -> str:
    match stage:
        case Stage.END_TO_END:
            return "end to end"
        case Stage.UNET_STEP:
            return "UNet step"
        case _:
            return STAGE_LABELS[stage]


def _lay_out_grid(result: BenchResult) -> list[Row]:
    report = result.report
    return [
        Row(
            prompt=prompt,
            shown=shorten(prompt) or "(an empty prompt)",
            seed=report.case.seed + index,
            tiles=tuple(_make_tiles(result, index)),
        )
        for index, prompt in enumerate(report.case.prompts[:_MOST_PROMPTS])
    ]


def _make_tiles(result: BenchResult, index: int) -> Sequence[Tile]:
    tiles = []
    drawn = [c for c in result.report.candidates if c.name in result.drawings]
    if result.reference is not None and all(c.name != Baseline.EAGER_FP32 for c in drawn):
        tiles.append(_make_tile(None, result.reference, None, index))
    return [*tiles, *(_make_tile(c, result.drawings[c.name], result.reference, index) for c in drawn)]


def _make_tile(candidate: CandidateRecord | None, drawing: Drawing, reference: Drawing | None, index: int) -> Tile:
    image = drawing.images[index]
    picture = to_picture(image)
    is_reference = reference is None or reference is drawing
    difference = (
        ""
        if is_reference
        else encode_picture(
            map_difference(to_picture(reference.images[index]), picture, _DIFFERENCE_GAIN)  # type: ignore[union-attr]
        )
    )
    fidelity = candidate.fidelity[index] if candidate and candidate.fidelity and not is_reference else None
    label = candidate.label if candidate else "torch eager fp32"
    is_engines = candidate is not None and candidate.name == ENGINES
    return Tile(label, is_engines, encode_picture(picture), difference, fidelity, find_fault(image))


def encode_picture(picture: np.ndarray) -> str:
    """uint8 RGB as a WebP data URI: exact when small, else at most 512 px a side."""
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_UP_TO_PX:
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.thumbnail((_SIDE_SHOWN_PX, _SIDE_SHOWN_PX), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
