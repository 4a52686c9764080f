"""A report and its pictures to one self-contained HTML file: no script, no network, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from sdopt.bench.case.candidates import ENGINES
from sdopt.bench.case.report import BenchReport, Scope, Stage, Status
from sdopt.bench.compare.picture_errors import CLIP_SCORE, FID, LPIPS
from sdopt.bench.measure.conditions import list_problems
from sdopt.bench.page.figures import (
    find_energy,
    find_layers,
    fit_candidate,
    list_processes,
    measure_roofline_use,
    split_device_memory,
    split_memory,
)
from sdopt.bench.page.pairs import judge_pairs, lay_out_matrix
from sdopt.bench.page.pictures import DIFFERENCE_GAIN, LOSSLESS_UP_TO_PX, MOST_PROMPTS, lay_out_grid
from sdopt.bench.page.plots import Plot, plot_latency, plot_spread
from sdopt.bench.page.stage_plots import STAGE_LABELS, plot_cosines, plot_device_memory, plot_memory, plot_stages
from sdopt.bench.page.summary import (
    CandidateSummary,
    agrees,
    describe_result,
    find_baseline,
    format_bytes,
    format_ns,
    format_p,
    format_share,
    format_si,
    format_speed,
    shorten,
    summarize_candidates,
)
from sdopt.bench.run import BenchResult
from sdopt.errors import MissingDependency
from sdopt.fidelity.compare_drawings import format_psnr

try:
    import jinja2
except ImportError as error:
    raise MissingDependency.of("jinja2", extra="report") from error

# Worst first: more would make the page too large to send, and all are in report.json.
_MOST_FIDELITY_ROWS = 120
_MOST_PROCESSES = 200


@dataclass(frozen=True)
class IndexEntry:
    """A report of several: its name, and where its page lies relative to the index."""

    name: str
    href: str
    report: BenchReport


def render_html(result: BenchResult) -> str:
    """The whole page. Raises `MissingDependency` (extra `report`) without Jinja2 or matplotlib."""
    report = result.report
    rows = summarize_candidates(report)
    measured = [row for row in rows if row.whole]
    pairs = judge_pairs(report)
    processes = list_processes(report)
    return _make_environment().get_template("report.html.j2").render(
        report=report,
        summary=describe_result(report),
        dirt=list_problems(report),
        rows=rows,
        measured=measured,
        stages=[(stage, _name_stage(stage)) for stage in Stage if any(stage in row.stages for row in measured)],
        baseline=baseline.label if (baseline := find_baseline(report)) else "",
        pairs=pairs,
        matrix=lay_out_matrix(pairs),
        roofline=measure_roofline_use(report, rows),
        memory=[(row, split_memory(row.record), split_device_memory(row)) for row in measured],
        fits=[(row, fit) for row in measured if (fit := fit_candidate(row.record))],
        energy={row.record.name: find_energy(row.record) for row in measured},
        errors=[(record, *item) for record in report.candidates for item in record.errors.items()],
        layers=find_layers(report),
        plugins={name: report.plugins.get(name, "not measured (no weights)") for name in (LPIPS, CLIP_SCORE, FID)},
        processes=processes[:_MOST_PROCESSES],
        processes_left_out=max(0, len(processes) - _MOST_PROCESSES),
        plots=_draw_plots(report, measured),
        fidelity=_sort_fidelity(report),
        grid=lay_out_grid(result),
        prompts_left_out=max(0, len(report.case.prompts) - MOST_PROMPTS),
        pixelated=max(report.case.width_px, report.case.height_px) <= LOSSLESS_UP_TO_PX,
        gain=DIFFERENCE_GAIN, most_fidelity_rows=_MOST_FIDELITY_ROWS, engines=ENGINES, ok=Status.OK, Stage=Stage,
        draws=report.case.scope is Scope.PICTURES,
    )  # fmt: skip


def render_index(title: str, entries: Sequence[IndexEntry]) -> str:
    """A page that links the reports of several runs, each with its summary."""
    template = _make_environment().get_template("index.html.j2")
    return template.render(title=title, entries=[(entry, describe_result(entry.report)) for entry in entries])


def _make_environment() -> jinja2.Environment:
    folder = files("sdopt.bench.page").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        ns=format_ns,
        size=format_bytes,
        speed=format_speed,
        psnr=format_psnr,
        shorten=shorten,
        p=format_p,
        si=format_si,
        share=format_share,
    )
    return environment


def _draw_plots(report: BenchReport, measured: Sequence[CandidateSummary]) -> dict[str, Plot]:
    """By name; those that have nothing to show are left out."""
    if not measured:
        return {}
    plots: dict[str, Plot | None] = {
        "latency": plot_latency(measured),
        "spread": plot_spread(measured),
        "stages": plot_stages(measured) if report.case.scope is Scope.PICTURES else None,
        "memory": plot_memory(measured),
        "device-memory": plot_device_memory(measured),
        "cosines": plot_cosines(measured),
    }
    return {name: plot for name, plot in plots.items() if plot}


def _sort_fidelity(report: BenchReport) -> list[tuple[Any, Any, bool]]:
    """(candidate, picture, within its limits): in the report's order, or the worst first where they are many."""
    found = [
        (record, picture, good)
        for record in report.candidates
        for picture, good in zip(record.fidelity, agrees(report, record), strict=True)
    ]
    if len(found) > _MOST_FIDELITY_ROWS:
        found.sort(key=lambda each: float("inf") if each[1].psnr_db is None else each[1].psnr_db)
    return found


def _name_stage(stage: Stage) -> str:
    match stage:
        case Stage.END_TO_END:
            return "end to end"
        case Stage.UNET_STEP:
            return "UNet step"
        case Stage.FIRST_STEP:
            return "time to first step"
        case _:
            return STAGE_LABELS[stage]
