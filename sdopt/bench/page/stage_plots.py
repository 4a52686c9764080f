"""The report's plots of what a call is made of, of memory, and of how the latents part from torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdopt.bench.case.report import CandidateRecord, Stage
from sdopt.bench.page.figures import split_device_memory, split_memory, worst_picture
from sdopt.bench.page.plots import GAP, SERIES, TEXT, WIDTH_IN, Plot, make_axes, style_axes, to_plot
from sdopt.bench.page.summary import CandidateSummary

STAGE_LABELS = {
    Stage.TEXT_ENCODER: "text encoder",
    Stage.VAE_ENCODER: "VAE encoder",
    Stage.UNET_STEP: "UNet",
    Stage.VAE_DECODER: "VAE decoder",
    Stage.OVERHEAD: "scheduler and loop",
}
_STAGE_COLOURS = {
    Stage.TEXT_ENCODER: SERIES[1],
    Stage.VAE_ENCODER: SERIES[2],
    Stage.UNET_STEP: SERIES[0],
    Stage.VAE_DECODER: SERIES[3],
    Stage.OVERHEAD: SERIES[4],
}
# Equal latents have no place on a logarithmic axis; below this, latents in fp32 are equal but for rounding.
_LEAST_DISTANCE = 1e-9
_LINES = ("solid", "dashed", "dotted", "dashdot")


def plot_stages(rows: Sequence[CandidateSummary]) -> Plot:
    """Mean time of each stage per call, stacked in the order of the legend."""
    shown = [stage for stage in STAGE_LABELS if any(row.stages.get(stage) for row in rows)]
    legend = [(_STAGE_COLOURS[stage], STAGE_LABELS[stage]) for stage in shown]
    values = [[_stage_seconds(row.record, stage) for stage in shown] for row in rows]
    return _plot_stack(
        "stages", [row.record.label for row in rows], values, legend, "seconds per call (mean)",
        "Where the time of a call goes: each candidate's stages, stacked.",
    )  # fmt: skip


def plot_memory(rows: Sequence[CandidateSummary]) -> Plot:
    """Resident memory of each candidate's process, in GB: in its parts where they are known, else the peak."""
    names = ("libraries", "opened networks", "drawing", "peak, not split")
    legend = list(zip((SERIES[4], SERIES[0], SERIES[1], SERIES[2]), names, strict=True))
    values = []
    for row in rows:
        parts = split_memory(row.record)
        whole = row.peak_rss_bytes or 0
        split = (parts.libraries_bytes, parts.networks_bytes, parts.drawing_bytes, 0) if parts else (0, 0, 0, whole)
        values.append([value / 1e9 for value in split])
    return _plot_stack(
        "memory", [row.record.label for row in rows], values, legend, "peak resident memory of the process, GB",
        "Memory of each candidate's process at its peak: what the libraries, the opened networks and drawing took.",
    )  # fmt: skip


def plot_device_memory(rows: Sequence[CandidateSummary]) -> Plot | None:
    """GPU memory at the peak, in GB; None where nobody says what it is made of."""
    split = [(row, parts) for row in rows if (parts := split_device_memory(row))]
    if not split:
        return None
    legend = [
        (SERIES[0], "weights"),
        (SERIES[1], "activations"),
        (SERIES[3], "inputs and outputs"),
        (SERIES[4], "rest"),
    ]
    values = [
        [part / 1e9 for part in (p.weights_bytes, p.activations_bytes, p.buffers_bytes, p.rest_bytes)]
        for _, p in split
    ]  # fmt: skip
    return _plot_stack(
        "device-memory", [row.record.label for row, _ in split], values, legend, "peak GPU memory of the process, GB",
        "GPU memory of each candidate's process at its peak: weights, activations, inputs and outputs, and the rest.",
    )  # fmt: skip


def plot_cosines(rows: Sequence[CandidateSummary]) -> Plot | None:
    """1 - cosine of the latents after each step, for the picture that parts most; None where it was not followed."""
    found = [(row.record, picture) for row in rows if (picture := worst_picture(row.record))]
    found = [(record, picture) for record, picture in found if 1 - min(picture.latent_cosines) > _LEAST_DISTANCE]
    if not found:
        return None
    figure = Figure(figsize=(WIDTH_IN, 2.6))
    axes = figure.add_axes((0.13, 0.2, 0.84, 0.76))
    for index, (record, picture) in enumerate(found):
        steps = range(1, len(picture.latent_cosines) + 1)
        distances = [max(_LEAST_DISTANCE, 1 - cosine) for cosine in picture.latent_cosines]
        style: dict[str, Any] = {
            "color": SERIES[index % len(SERIES)],
            "linestyle": _LINES[index % len(_LINES)],
            "linewidth": 1.8,
        }
        axes.plot(steps, distances, marker="o", markersize=3, label=record.label, **style)
    axes.set_yscale("log")
    style_axes(axes, "step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel("1 - cosine", fontsize=10.5, color=TEXT)
    legend = [
        (SERIES[index % len(SERIES)], f"{record.label} ({_LINES[index % len(_LINES)]})")
        for index, (record, _) in enumerate(found)
    ]
    title = "How far the latents are from torch's after each step, in each candidate's worst picture. Lower is closer."
    return to_plot(figure, "cosines", title, legend)


def _plot_stack(
    name: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    legend: Sequence[tuple[str, str]],
    axis_title: str,
    title: str,
) -> Plot:
    """Stacked bars: `values` has a row for each label and a column for each entry of the legend."""
    figure, axes = make_axes(labels, axis_title)
    lefts = [0.0] * len(labels)
    used = []
    heights = [y + 0.1 for y in range(len(labels))]
    for column, entry in enumerate(legend):
        widths = [row[column] for row in values]
        if not any(widths):
            continue
        used.append(entry)
        axes.barh(heights, widths, left=lefts, height=0.4, color=entry[0], edgecolor=GAP, linewidth=0.8)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for y, total in zip(heights, lefts, strict=True):
        axes.annotate(
            f"{total:.3g}", (total, y), (4, 0), textcoords="offset points", va="center", color=TEXT, fontsize=10
        )
    axes.set_xlim(0, max(lefts, default=0) * 1.14 or 1)
    return to_plot(figure, name, title, used)


def _stage_seconds(record: CandidateRecord, stage: Stage) -> float:
    calls = sum(len(group) for group in record.samples_of(Stage.END_TO_END))
    return sum(sum(group) for group in record.samples_of(stage)) / 1e9 / max(1, calls)
