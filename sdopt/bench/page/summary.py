"""What a report says, in words and formatted figures: shared by the terminal and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdopt.bench.case.candidates import ENGINES, Baseline
from sdopt.bench.case.report import (
    BenchReport,
    CandidateRecord,
    DeviceMemoryRecord,
    ProcessRecord,
    Scope,
    Stage,
    Status,
)
from sdopt.bench.case.stats import PairVerdict, Ratio, Speed, Summary, compare_speed, judge_pair, summarize
from sdopt.bench.measure.conditions import list_problems
from sdopt.fidelity.compare_drawings import format_psnr
from sdopt.fidelity.picture_limits import find_limits
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision

NOT_MEASURED = "\N{EN DASH}"
# Of names that users give, and of a failure's message, in a sentence.
_LABEL_CHARS, _MESSAGE_CHARS = 80, 300


@dataclass(frozen=True)
class CandidateSummary:
    """A candidate's derived figures. `speed` is against the baseline; None where either was not measured.

    `main_stage` is the one that decides what is faster.
    `device_memory` is what its engines hold of the GPU, by component; empty where no runtime says it.
    """

    record: CandidateRecord
    main_stage: Stage
    stages: dict[Stage, Summary]
    speed: Ratio | None
    import_ns: float | None
    load_ns: float | None
    first_picture_ns: float | None
    cold_start_ns: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    torch_peak_device_bytes: int | None
    device_memory: dict[ComponentName, DeviceMemoryRecord]

    @property
    def whole(self) -> Summary | None:
        """Of the stage that decides; None for a candidate that failed."""
        return self.stages.get(self.main_stage) if self.record.status is Status.OK else None

    @property
    def worst_psnr_db(self) -> float | None:
        """Of its pictures against torch fp32, in dB; infinity for equal ones, None where not measured."""
        return min((math.inf if f.psnr_db is None else f.psnr_db for f in self.record.fidelity), default=None)


def find_baseline(report: BenchReport) -> CandidateRecord | None:
    """What speeds are given against: torch eager in fp32, or in fp16 where it was measured in no other."""
    return report.candidate(Baseline.EAGER_FP32) or report.candidate(Baseline.EAGER_FP16)


def summarize_candidates(report: BenchReport) -> list[CandidateSummary]:
    baseline = find_baseline(report)
    return [_summarize(candidate, baseline, report.case.scope.stage) for candidate in report.candidates]


def _summarize(record: CandidateRecord, baseline: CandidateRecord | None, main_stage: Stage) -> CandidateSummary:
    stages = {stage: summary for stage in Stage if (summary := summarize(record.samples_of(stage)))}
    speed = None
    if baseline is not None and baseline.name != record.name:
        speed = compare_speed(baseline.samples_of(main_stage), record.samples_of(main_stage))
    processes = record.processes
    # The least of several cold starts: the first one also pays for a cold disk cache.
    return CandidateSummary(
        record, main_stage, stages, speed,
        import_ns=min((process.import_ns for process in processes), default=None),
        load_ns=min((process.load_ns for process in processes), default=None),
        first_picture_ns=min((process.first_picture_ns for process in processes), default=None),
        cold_start_ns=min((process.cold_start_ns for process in processes), default=None),
        peak_rss_bytes=max((process.peak_rss_bytes for process in processes), default=None),
        peak_device_bytes=_most(process.peak_device_bytes for process in processes),
        torch_peak_device_bytes=_most(process.torch_peak_device_bytes for process in processes),
        device_memory=_most_device_memory(processes),
    )  # fmt: skip


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _most_device_memory(processes: Sequence[ProcessRecord]) -> dict[ComponentName, DeviceMemoryRecord]:
    """Of each component, the record of the process in which it held most."""
    records = [(name, memory) for process in processes for name, memory in process.device_memory.items()]
    most = dict(sorted(records, key=lambda item: item[1].total_bytes))
    return {name: most[name] for name in dict(records)}


def describe_result(report: BenchReport) -> str:
    """The result in a few sentences: how fast the engines are, whether the run can be believed, and whether the
    pictures agree.
    """
    engines = report.candidate(ENGINES)
    if engines is None:
        return "The engines of the bundle were not measured."
    if engines.status is not Status.OK:
        message = shorten(engines.message.splitlines()[0], _MESSAGE_CHARS)
        return f"The engines ({shorten(engines.label)}) {engines.status}: {message}"
    parts = [
        _describe_speeds(report, engines),
        *(f"{shorten(other.label)} {other.status}." for other in report.candidates if other.status is not Status.OK),
        *([f"{_capitalise(_join(dirt))}, so measure again before you believe the times."]
          if (dirt := list_problems(report)) else []),
        _describe_pictures(report, engines),
    ]  # fmt: skip
    return " ".join(filter(None, parts)) + _describe_device_memory(engines)


def _describe_speeds(report: BenchReport, engines: CandidateRecord) -> str:
    stage = report.case.scope.stage
    groups = engines.samples_of(stage)
    whole = summarize(groups)
    judged = [
        (verdict, shorten(other.label))
        for other in report.candidates
        if other.name != ENGINES
        and other.status is Status.OK
        and (verdict := judge_pair(other.samples_of(stage), groups))
    ]
    parts = [text for speed in Speed if (text := _describe_verdicts(speed, judged))]
    what = "a picture" if report.case.batch == 1 else f"{report.case.batch} pictures"
    does = f"draws {what}" if report.case.scope is Scope.PICTURES else "takes a step of the UNet"
    text = f"{shorten(engines.label)} {does} in {format_ns(whole.median_ns if whole else None)}"
    return f"{text}: {'; '.join(parts)}." if parts else f"{text}."


def _describe_verdicts(speed: Speed, judged: Sequence[tuple[PairVerdict, str]]) -> str:
    """'faster than A (2.43 times as fast) and B (1.40 times as fast)'; empty where no pair has this verdict."""
    chosen = [(verdict, label) for verdict, label in judged if verdict.speed is speed]
    if not chosen:
        return ""
    if speed is Speed.NO_DIFFERENCE:
        return f"no difference from {_join([label for _, label in chosen])}"
    return f"{speed} than {_join([f'{label} ({verdict.ratio.value:.2f} times as fast)' for verdict, label in chosen])}"


def _describe_pictures(report: BenchReport, engines: CandidateRecord) -> str:
    if report.case.scope is not Scope.PICTURES:
        return "No pictures were drawn."
    if not engines.fidelity:
        return "Its pictures were not compared, because torch fp32 could not draw them."
    worst = min(engines.fidelity, key=lambda f: math.inf if f.psnr_db is None else f.psnr_db)
    figures = f"PSNR {format_psnr(worst.psnr_db)} or better, SSIM {min(f.ssim for f in engines.fidelity):.3f} or better"
    if all(agrees(report, engines)):
        return f"The pictures agree with those of torch fp32 ({figures})."
    return f"The pictures differ from those of torch fp32 ({figures.replace(' or better', '')})."


def _describe_device_memory(engines: CandidateRecord) -> str:
    held = _most_device_memory(engines.processes).values()
    if not held:
        return ""
    # They run in turn, and share the largest scratch memory.
    activations_bytes = _most(memory.activations_bytes for memory in held)
    parts = {
        "weights": sum(memory.weights_bytes for memory in held),
        "activations": activations_bytes,
        "inputs and outputs": sum(memory.buffers_bytes for memory in held),
    }
    known = {name: size for name, size in parts.items() if size is not None}
    listed = _join([f"{format_bytes(size)} of {name}" for name, size in known.items()])
    text = f" On the GPU its engines hold {format_bytes(sum(known.values()))}: {listed}"
    peak_bytes = _most(process.peak_device_bytes for process in engines.processes)
    return f"{text}." if peak_bytes is None else f"{text}; the process held {format_bytes(peak_bytes)} at its peak."


def agrees(report: BenchReport, record: CandidateRecord) -> tuple[bool, ...]:
    """For each picture of a candidate, whether it reaches what the fidelity verdict asks of its precision.

    torch in bf16 or fp16, where the bench measured it, sets the limits of 16-bit candidates.
    """
    peer = report.candidate(Baseline.EAGER_FP16 if record.precision is Precision.FP16 else Baseline.EAGER_BF16)
    limits = find_limits(record.fidelity, record.precision, peer.fidelity if peer else ())
    return tuple(limit.holds_for(image) for limit, image in zip(limits, record.fidelity, strict=True))


def shorten(text: str, limit: int = _LABEL_CHARS) -> str:
    """At most `limit` characters; an ellipsis stands for what is cut off."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def format_ns(value_ns: float | None) -> str:
    """Three digits and a unit; a dash for what was not measured."""
    if value_ns is None:
        return NOT_MEASURED
    if value_ns < 0:  # the fixed cost of a line through noisy times
        return f"-{format_ns(-value_ns)}"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if value_ns >= size:
            value = value_ns / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{value_ns:.0f} ns"


def format_bytes(value_bytes: float | None) -> str:
    """Decimal units, as disks are sold."""
    if value_bytes is None:
        return NOT_MEASURED
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value_bytes >= size:
            return f"{value_bytes / size:.{2 if value_bytes < 10 * size else 0}f} {unit}"
    return f"{value_bytes:.0f} B"


def format_si(value: float) -> str:
    """Three digits and a prefix with its space, to stand before a unit: '1.23 T'."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def format_share(value: float) -> str:
    """Per cent, with two digits where it has only one before the point."""
    return f"{100 * value:.{1 if value < 0.1 else 0}f} %"


def format_speed(ratio: Ratio | None) -> str:
    return NOT_MEASURED if ratio is None else f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def format_p(value: float) -> str:
    """A p value with two digits; what is smaller than 0.0001 only as that."""
    return "<0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
