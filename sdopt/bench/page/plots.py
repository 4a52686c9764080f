"""The report's plots of times as inline SVG by matplotlib: no script, the page's own colours, the same bytes each
time.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from sdopt.bench.case.candidates import ENGINES
from sdopt.bench.case.report import CandidateRecord
from sdopt.bench.page.summary import CandidateSummary
from sdopt.errors import MissingDependency

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingDependency.of("matplotlib", extra="report") from error

# Colours that matplotlib writes and that become variables of the page, which has others in the dark.
TEXT, LINE, ENGINES_COLOUR, OTHERS_COLOUR, GAP = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16", "#0a0b17", "#0a0b18")
_VARIABLES = {
    TEXT: "currentColor", LINE: "var(--grid)", ENGINES_COLOUR: "var(--s1)", OTHERS_COLOUR: "var(--s5)",
    GAP: "var(--card)", **{colour: f"var(--s{index + 1})" for index, colour in enumerate(SERIES)},
}  # fmt: skip

# 374 pt wide: on a phone of 390 px the text keeps its size.
WIDTH_IN, _ROW_IN, _FOOT_IN = 5.2, 0.58, 0.5
_LABEL_CHARS = 54
# A dot is 90 bytes of the page: of more samples, evenly chosen ones are drawn.
MOST_DOTS = 400


@dataclass(frozen=True)
class Plot:
    """An inline SVG, what it shows in a sentence, and the series of its legend as (variable of the page, name)."""

    svg: str
    title: str
    legend: tuple[tuple[str, str], ...] = ()


def plot_latency(rows: Sequence[CandidateSummary]) -> Plot:
    """Every sample of the main stage as a dot, each process in a line of its own, and the median as a bar."""
    figure, axes = make_axes([row.record.label for row in rows], "seconds")
    for y, row in enumerate(rows):
        groups = [np.asarray(group) / 1e9 for group in row.record.samples_of(row.main_stage)]
        _draw_dots(axes, y, groups, _colour(row.record))
        if row.whole:
            axes.vlines(row.whole.median_ns / 1e9, y - 0.11, y + 0.31, color=TEXT, linewidth=1.6)
    axes.set_xlim(left=0)
    return to_plot(
        figure, "latency", "Time of every timed call: a dot each, a line of dots for each process. Bar: the median."
    )


def plot_spread(rows: Sequence[CandidateSummary]) -> Plot:
    """The same samples as differences from their own median in per cent, over a box from p25 to p75."""
    figure, axes = make_axes([row.record.label for row in rows], "per cent from the candidate's own median")
    for y, row in enumerate(rows):
        if row.whole is None:
            continue
        median_ns = row.whole.median_ns
        groups = [(np.asarray(group) / median_ns - 1) * 100 for group in row.record.samples_of(row.main_stage)]
        low, high = np.percentile(np.concatenate(groups), (25, 75))
        axes.barh(y + 0.1, high - low, left=low, height=0.42, color=LINE)
        _draw_dots(axes, y, groups, _colour(row.record))
        axes.vlines(0, y - 0.11, y + 0.31, color=TEXT, linewidth=1.6)
    return to_plot(
        figure, "spread", "How far the calls lie from their candidate's median. Box: the middle half of them."
    )


def _draw_dots(axes: Any, y: int, groups: Sequence[np.ndarray], colour: str) -> None:
    share = max(1, MOST_DOTS // max(1, len(groups)))
    for place, group in enumerate(groups):
        shown = group if len(group) <= share else group[np.linspace(0, len(group) - 1, share).round().astype(int)]
        height = y + 0.1 + 0.34 * ((place + 0.5) / len(groups) - 0.5)
        axes.scatter(shown, [height] * len(shown), s=13, color=colour, alpha=0.7, linewidths=0)


def _colour(record: CandidateRecord) -> str:
    return ENGINES_COLOUR if record.name == ENGINES else OTHERS_COLOUR


def make_axes(labels: Sequence[str], title: str) -> tuple[Any, Any]:
    """Axes with a row for each label, which stands above its bar: however long it is, the bars keep the width."""
    height_in = _FOOT_IN + _ROW_IN * len(labels)
    figure = Figure(figsize=(WIDTH_IN, height_in))
    axes = figure.add_axes((0.05, _FOOT_IN / height_in, 0.91, 1 - _FOOT_IN / height_in))
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.6, -0.55)
    for y, label in enumerate(labels):
        shown = label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"
        # A label is the user's own text: dollars in it are not a formula.
        axes.text(
            0, y - 0.16, shown, transform=axes.get_yaxis_transform(), fontsize=11, color=TEXT, va="bottom",
            parse_math=False,
        )  # fmt: skip
    style_axes(axes, title)
    return figure, axes


def style_axes(axes: Any, title: str) -> None:
    axes.set_xlabel(title, fontsize=10.5, color=TEXT)
    axes.tick_params(colors=TEXT, labelsize=10.5, length=0, which="both")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(LINE)


def to_plot(figure: Any, name: str, title: str, legend: Sequence[tuple[str, str]] = ()) -> Plot:
    """The figure as SVG. `name` makes its ids differ from those of the page's other plots; `legend` has pairs of a
    colour of this module and a name.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), warnings.catch_warnings():
        # The text stays text, in the reader's fonts: what matplotlib's own font lacks is nothing to warn of.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    # Without width and height it takes the width of the page, and keeps its shape by its view box.
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    named = f'<svg role="img" aria-label={quoteattr(title)} '
    svg = f"{head.replace('<svg ', named, 1)}>{body}"
    return Plot(svg, title, tuple((_VARIABLES[colour], label) for colour, label in legend))
