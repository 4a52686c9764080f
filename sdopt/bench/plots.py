"""The report's plots as inline SVG by matplotlib: no script, the page's own text colour, the same bytes each
time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from sdopt.bench.candidates import ENGINES
from sdopt.bench.report import CandidateRecord, Stage
from sdopt.bench.summary import CandidateSummary
from sdopt.errors import MissingDependency

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingDependency.of("matplotlib", extra="report") from error

# Replaced by `currentColor`, so that text is dark on light and light on dark.
_TEXT = "#0a0b0c"
_ENGINES, _OTHERS = "#2f7fd1", "#8a94a3"
# Told apart by lightness as well as by hue.
_STAGE_COLOURS = {
    Stage.TEXT_ENCODER: "#c9a227",
    Stage.VAE_ENCODER: "#b05a8c",
    Stage.UNET_STEP: "#2f7fd1",
    Stage.VAE_DECODER: "#5fb49c",
    Stage.OVERHEAD: "#8a94a3",
}
STAGE_LABELS = {
    Stage.TEXT_ENCODER: "text encoder",
    Stage.VAE_ENCODER: "VAE encoder",
    Stage.UNET_STEP: "UNet",
    Stage.VAE_DECODER: "VAE decoder",
    Stage.OVERHEAD: "scheduler and loop",
}
# 374 pt wide: on a phone of 390 px the text keeps its size.
_WIDTH_IN, _ROW_IN = 5.2, 0.42


def plot_latency(rows: Sequence[CandidateSummary]) -> str:
    """Every end-to-end sample as a dot, and the median as a line."""
    figure, axes = _make_axes([row.record.label for row in rows], "seconds for one call, prompt to pixels")
    for y, row in enumerate(rows):
        samples_s = [sample / 1e9 for group in row.record.samples_of(Stage.END_TO_END) for sample in group]
        # A fixed zigzag keeps equal samples apart without chance.
        heights = [y + 0.09 * ((i % 5) - 2) for i in range(len(samples_s))]
        axes.scatter(samples_s, heights, s=14, color=_colour(row.record), alpha=0.75, linewidths=0)
        if row.whole:
            axes.vlines(row.whole.median_ns / 1e9, y - 0.36, y + 0.36, color=_TEXT, linewidth=1.5)
    return _to_svg(figure, "latency", "Time of every timed call of each candidate, with the median as a line.")


def plot_stages(rows: Sequence[CandidateSummary]) -> str:
    """Mean time of each stage per call, stacked."""
    figure, axes = _make_axes([row.record.label for row in rows], "seconds per call, by stage (mean)")
    shown = [stage for stage in _STAGE_COLOURS if any(row.stages.get(stage) for row in rows)]
    lefts = [0.0] * len(rows)
    for stage in shown:
        widths = [_stage_seconds(row.record, stage) for row in rows]
        axes.barh(
            range(len(rows)), widths, left=lefts, height=0.6, color=_STAGE_COLOURS[stage], label=STAGE_LABELS[stage]
        )
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.legend(loc="lower left", bbox_to_anchor=(-0.3, 1.0), ncols=3, frameon=False, fontsize=10, labelcolor=_TEXT)
    return _to_svg(figure, "stages", "Where the time of a call goes: each candidate's stages, stacked.")


def plot_memory(rows: Sequence[CandidateSummary]) -> str:
    """Peak resident memory of the process of each candidate."""
    figure, axes = _make_axes([row.record.label for row in rows], "peak resident memory of the process, GB")
    for y, row in enumerate(rows):
        value_gb = (row.peak_rss_bytes or 0) / 1e9
        axes.barh(y, value_gb, height=0.6, color=_colour(row.record))
        axes.annotate(
            f"{value_gb:.2f}", (value_gb, y), (4, 0), textcoords="offset points", va="center", color=_TEXT, fontsize=10
        )
    axes.margins(x=0.12)
    return _to_svg(figure, "memory", "Peak resident memory of each candidate's process.")


def _stage_seconds(record: CandidateRecord, stage: Stage) -> float:
    calls = sum(len(group) for group in record.samples_of(Stage.END_TO_END))
    return sum(sum(group) for group in record.samples_of(stage)) / 1e9 / max(1, calls)


def _colour(record: CandidateRecord) -> str:
    return _ENGINES if record.name == ENGINES else _OTHERS


def _make_axes(labels: Sequence[str], title: str) -> tuple[Any, Any]:
    figure = Figure(figsize=(_WIDTH_IN, 0.75 + _ROW_IN * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels, fontsize=11, color=_TEXT)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlabel(title, fontsize=10.5, color=_TEXT)
    axes.tick_params(colors=_TEXT, labelsize=10.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_OTHERS, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_OTHERS)
    return figure, axes


def _to_svg(figure: Any, name: str, description: str) -> str:
    figure.axes[0].set_xlim(left=0)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Several drawings share the page: their ids must differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\s(?:width|height)="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(description)} ', 1)
