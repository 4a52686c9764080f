"""The gate's one page, in Markdown for a job's summary and as HTML for a mail: what happened, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sdopt.perf.gate.findings import Finding, GateReport, Outcome, Rule
from sdopt.perf.history.record import MetricKind, RunRecord, SeriesKey

_MOST_ROWS = 25
_SENTENCE_CHARS = 300
_COLUMNS = ("What", "Series", "Before", "Tonight", "Change", "p", "q", "Rests on")
_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;"
    "padding:0 1rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{text-align:left;padding:.35rem .6rem;border-top:1px solid #8886;overflow-wrap:anywhere}"
    ".scroll{overflow-x:auto}pre{overflow-x:auto;padding:.75rem;border:1px solid #8886}"
)


@dataclass(frozen=True)
class _Section:
    """A heading over a table, a list or commands; what is empty is left out."""

    title: str
    rows: tuple[tuple[str, ...], ...] = ()
    items: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def describe_gate(report: GateReport) -> str:
    """The headline: one sentence for a subject line."""
    if not report.findings:
        return f"Nothing to report: {_describe_times(report)}, held against {report.nights} nights."
    first, more = _shorten(report.findings[0].sentence), len(report.findings) - 1
    others = f", and {more} more {'findings' if more > 1 else 'finding'}" if more else ""
    return f"{'Alarm' if _is_worse(report) else 'Better than before, please look'}: {first}{others}."


def _describe_times(report: GateReport) -> str:
    if not report.times_judged:
        return "times not judged"
    waiting = sum(1 for suspect in report.suspects if suspect.outcome is Outcome.OPEN)
    if waiting:
        return (
            f"{report.screened - waiting} of {report.screened} series as usual, {waiting} left open to the next night"
        )
    return f"{report.screened} series as usual"


def render_markdown(report: GateReport, tonight: RunRecord) -> str:
    """One page: at most 25 findings in its table, and the number of the others."""
    lines = [f"# {_to_markdown(describe_gate(report))}", "", _to_markdown(_describe_run(report, tonight))]
    for section in _list_sections(report, tonight):
        lines += ["", f"## {section.title}", ""]
        if section.rows:
            lines += [_join_cells(_COLUMNS), _join_cells(["---"] * len(_COLUMNS))]
            lines += [_join_cells(map(_to_markdown, row)) for row in section.rows]
            lines += [""] if section.items else []
        lines += [f"- {_to_markdown(item)}" for item in section.items]
        if section.commands:
            lines += ["```", *section.commands, "```"]
    return "\n".join(lines) + "\n"


def render_page(report: GateReport, tonight: RunRecord) -> str:
    """The same as one HTML file without scripts or links to elsewhere; everything in it is escaped."""
    headline = escape(describe_gate(report))
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{headline}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><main><h1>{headline}</h1>",
        f"<p>{escape(_describe_run(report, tonight))}</p>",
    ]
    for section in _list_sections(report, tonight):
        parts.append(f"<h2>{section.title}</h2>")
        if section.rows:
            head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in section.rows
            )
            parts.append(f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>')
        if section.items:
            parts.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in section.items) + "</ul>")
        if section.commands:
            parts.append(f"<pre>{escape(chr(10).join(section.commands))}</pre>")
    return "\n".join([*parts, "</main></body></html>"]) + "\n"


def _list_sections(report: GateReport, tonight: RunRecord) -> list[_Section]:
    shown, left = report.findings[:_MOST_ROWS], report.findings[_MOST_ROWS:]
    items = tuple(_shorten(f.sentence) for f in shown) + ((f"and {len(left)} more in the JSON",) if left else ())
    sections = [
        _Section("Findings", tuple(map(_list_cells, shown)), items),
        _Section("What to do", commands=_list_commands(report, tonight)),
        _Section("Looked at", items=(*_describe_screen(report), *map(_shorten, report.notes))),
        _Section("Environment", items=_describe_environment(tonight)),
    ]
    return [section for section in sections if section.rows or section.items or section.commands]


def _list_cells(finding: Finding) -> tuple[str, ...]:
    numbers = [f"{p:.2g}" if p is not None else "" for p in (finding.p_value, finding.q_value)]
    return (
        finding.rule, str(finding.series or ""), _format_value(finding.series, finding.old),
        _format_value(finding.series, finding.new), _format_change(finding), *numbers, finding.evidence,
    )  # fmt: skip


def _list_commands(report: GateReport, tonight: RunRecord) -> tuple[str, ...]:
    """A bisection follows one series of times: that of the most pressing finding which has one."""
    if not report.findings or not report.last_good_run:
        return ()
    commands = [f"sdopt perf compare {report.last_good_run} {report.run}"]
    slower = next((f.series for f in report.findings if f.series and f.rule in (Rule.SLOWER, Rule.DRIFT)), None)
    if slower and report.last_good_commit and report.commit and report.last_good_commit != report.commit:
        span = f"{report.last_good_commit[:12]}..{report.commit[:12]}"
        commands.append(f"sdopt perf bisect {span} --suite {tonight.suite} --series {slower}")
    commands.append(f"sdopt perf gate --accept {report.run}")
    return tuple(commands)


def _describe_run(report: GateReport, tonight: RunRecord) -> str:
    against = f"last good commit {report.last_good_commit[:12]}" if report.last_good_commit else "no last good commit"
    changed = ", with changes that are not committed" if tonight.changed else ""
    return f"Run {report.run} of suite {tonight.suite}, commit {report.commit[:12] or 'unknown'}{changed}; {against}."


def _describe_screen(report: GateReport) -> tuple[str, ...]:
    counts = [(outcome, sum(1 for s in report.suspects if s.outcome is outcome)) for outcome in Outcome]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts if count) or "none out of its range"
    drift = "looked for" if report.looked_for_drift else "looked for on the first night of a week"
    return (f"{report.screened} series of times against {report.nights} nights: {outcomes}", f"slow drift: {drift}")


def _describe_environment(tonight: RunRecord) -> tuple[str, ...]:
    environment = tonight.environment
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(environment.libraries.items()))
    gpus = tuple(f"{gpu.name}, driver {gpu.driver}" for gpu in environment.gpus)
    machine = f"{environment.processor}, {tonight.logical_cores} logical cores, {tonight.memory_bytes / 2**30:.0f} GiB"
    software = f"{environment.system}, Python {environment.python}, sdopt {environment.sdopt}, {libraries}"
    return (machine, *gpus, software, f"fingerprint {tonight.fingerprint}")


def _format_value(series: SeriesKey | None, value: float | None) -> str:
    if series is None or value is None:
        return ""
    match series.metric.kind:
        case MetricKind.TIME | MetricKind.START | MetricKind.BUILD:
            return f"{value / 1e9:.4g} s" if value >= 1e9 else f"{value / 1e6:.4g} ms"
        case MetricKind.MEMORY | MetricKind.SIZE:
            return f"{value / 2**20:.5g} MiB"
        case MetricKind.PSNR:
            return f"{value:.2f} dB"
        case MetricKind.SSIM:
            return f"{value:.4f}"


def _format_change(finding: Finding) -> str:
    if finding.change is None:
        return ""
    return f"{finding.change:+.3g}" if finding.rule is Rule.FIDELITY else f"{finding.change:+.1%}"


def _is_worse(report: GateReport) -> bool:
    return any(finding.rule is not Rule.IMPROVED for finding in report.findings)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SENTENCE_CHARS else line[: _SENTENCE_CHARS - 1] + "…"


def _to_markdown(text: str) -> str:
    """One line in which nothing is markup: messages come from other programs."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _join_cells(cells: Sequence[str] | map[str]) -> str:
    return f"| {' | '.join(cells)} |"
