"""What a report says, in words and formatted figures: shared by the terminal and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdopt.bench.candidates import ENGINES, Baseline
from sdopt.bench.report import BenchReport, CandidateRecord, DeviceMemoryRecord, ProcessRecord, Stage, Status
from sdopt.bench.stats import Ratio, Summary, compare_speed, summarize
from sdopt.fidelity.verdict import find_limits, format_psnr
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision

# Smaller differences are called none: another layout of the same code in memory makes as much.
_LEAST_EFFECT = 0.02

NOT_MEASURED = "-"


@dataclass(frozen=True)
class CandidateSummary:
    """A candidate's derived figures. `speed` is against the baseline; None where either was not measured.

    `device_memory` is what its engines hold of the GPU, by component; empty where no runtime says it.
    """

    record: CandidateRecord
    stages: dict[Stage, Summary]
    speed: Ratio | None
    load_ns: float | None
    first_picture_ns: float | None
    cold_start_ns: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    torch_peak_device_bytes: int | None
    device_memory: dict[ComponentName, DeviceMemoryRecord]

    @property
    def whole(self) -> Summary | None:
        return self.stages.get(Stage.END_TO_END)

    @property
    def worst_psnr_db(self) -> float | None:
        """Of its pictures against torch fp32, in dB; infinity for equal ones, None where not measured."""
        return min((math.inf if f.psnr_db is None else f.psnr_db for f in self.record.fidelity), default=None)


def find_baseline(report: BenchReport) -> CandidateRecord | None:
    """What speeds are given against: torch eager in fp32, or in fp16 where it was measured in no other."""
    return report.candidate(Baseline.EAGER_FP32) or report.candidate(Baseline.EAGER_FP16)


def summarize_candidates(report: BenchReport) -> list[CandidateSummary]:
    baseline = find_baseline(report)
    return [_summarize(candidate, baseline) for candidate in report.candidates]


def _summarize(record: CandidateRecord, baseline: CandidateRecord | None) -> CandidateSummary:
    stages = {stage: summary for stage in Stage if (summary := summarize(record.samples_of(stage)))}
    speed = None
    if baseline is not None and baseline.name != record.name:
        speed = compare_speed(baseline.samples_of(Stage.END_TO_END), record.samples_of(Stage.END_TO_END))
    processes = record.processes
    # The least of several cold starts: the first one also pays for a cold disk cache.
    return CandidateSummary(
        record, stages, speed,
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
    """The result in a sentence or three: how fast the engines are, and whether the pictures agree."""
    engines = report.candidate(ENGINES)
    if engines is None:
        return "The engines of the bundle were not measured."
    if engines.status is not Status.OK:
        return f"The engines ({engines.label}) {engines.status}: {engines.message.splitlines()[0]}"
    speeds = [
        f"{_describe_speed(ratio)} {baseline.label}"
        for baseline in report.candidates
        if baseline.name != ENGINES
        and (ratio := compare_speed(baseline.samples_of(Stage.END_TO_END), engines.samples_of(Stage.END_TO_END)))
    ]
    whole = summarize(engines.samples_of(Stage.END_TO_END))
    what = "a picture" if report.case.batch == 1 else f"{report.case.batch} pictures"
    first = f"{engines.label} draws {what} in {format_ns(whole.median_ns if whole else None)}"
    if speeds:
        first += f": {_join(speeds)}"
    if report.machine.conditions.was_shared:
        shared = f"{report.machine.conditions.neighbours_cores:.1f} of {report.machine.logical_cores} cores"
        first += f". Other programs kept {shared} busy, so measure again before you believe the times"
    return f"{first}. {_describe_pictures(report, engines)}{_describe_device_memory(engines)}"


def _describe_speed(ratio: Ratio) -> str:
    if ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) < _LEAST_EFFECT:
        return "no faster or slower than"
    return f"{ratio.value:.2f} times as fast as"


def _describe_pictures(report: BenchReport, engines: CandidateRecord) -> str:
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

    torch in bf16 or fp16, where the bench measured it, is the second hearing.
    """
    peer = report.candidate(Baseline.EAGER_FP16 if record.precision is Precision.FP16 else Baseline.EAGER_BF16)
    limits = find_limits(record.fidelity, record.precision, peer.fidelity if peer else ())
    return tuple(limit.holds_for(image) for limit, image in zip(limits, record.fidelity, strict=True))


def format_ns(value_ns: float | None) -> str:
    """Three digits and a unit; a dash for what was not measured."""
    if value_ns is None:
        return NOT_MEASURED
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


def format_speed(ratio: Ratio | None) -> str:
    return NOT_MEASURED if ratio is None else f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
