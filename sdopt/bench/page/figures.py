"""What the report's tables show beside times: derived from the record, None where it was not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sdopt.bench.case.report import (
    BenchReport,
    CandidateRecord,
    LayerRecord,
    PictureRecord,
    ProcessRecord,
    RooflineRecord,
    Stage,
)
from sdopt.bench.case.stats import StepFit, fit_steps
from sdopt.bench.page.summary import CandidateSummary
from sdopt.model.backend_settings import BackendSettings, OpenVINOSettings, TensorRTSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision

WORST_LAYERS = 10
_COMPONENT_STAGES = {
    ComponentName.TEXT_ENCODER: Stage.TEXT_ENCODER,
    ComponentName.UNET: Stage.UNET_STEP,
    ComponentName.VAE_DECODER: Stage.VAE_DECODER,
    ComponentName.VAE_ENCODER: Stage.VAE_ENCODER,
}


@dataclass(frozen=True)
class RooflineUse:
    """What part of the machine's measured product rate a network reaches. `precision` is what the network computes in,
    `against` that of the rate: the same, or the fastest measured where there is no rate of it. `share` is None where
    the network is faster than the product: then no roof was measured, and `reason` says why.
    """

    candidate: CandidateRecord
    component: ComponentName
    flops: int
    median_ns: float
    flops_per_s: float
    share: float | None
    precision: Precision
    against: Precision
    reason: str = ""


@dataclass(frozen=True)
class MemoryParts:
    """Resident memory of the process that held most, in three parts that add up to its peak, in bytes."""

    libraries_bytes: int
    networks_bytes: int
    drawing_bytes: int


@dataclass(frozen=True)
class DeviceParts:
    """What the process held of its GPU at its peak, in bytes; `rest` is CUDA, kernels, and what no runtime names."""

    weights_bytes: int
    activations_bytes: int
    buffers_bytes: int
    rest_bytes: int


@dataclass(frozen=True)
class LayerFinding:
    """Of one candidate: how many layers were compared, the first that parts from torch, and the worst."""

    candidate: CandidateRecord
    compared: int
    first: LayerRecord | None
    worst: tuple[LayerRecord, ...]


def measure_roofline_use(report: BenchReport, rows: Sequence[CandidateSummary]) -> list[RooflineUse]:
    """Of every network whose operations are counted and whose runs are timed one by one."""
    uses = []
    # Both encoders' runs are samples of one stage: which is whose cannot be told.
    shared = ComponentName.TEXT_ENCODER_2 in report.case.flops
    for row in rows if report.roofline else ():
        for component, flops in report.case.flops.items():
            stage = _COMPONENT_STAGES.get(component)
            if row.whole is None or stage not in row.stages or (shared and component.is_text_encoder):
                continue
            median_ns = row.stages[stage].median_ns
            precision = row.record.precisions.get(component, row.record.precision)
            if (rate := _find_rate(report, row.record, precision)) is None:
                continue
            reached = flops / (median_ns / 1e9)
            share, reason = _hold_against(reached, rate)
            use = RooflineUse(
                row.record, component, flops, median_ns, reached, share, precision, rate.precision, reason
            )
            uses.append(use)
    return uses


def _hold_against(reached: float, rate: RooflineRecord) -> tuple[float | None, str]:
    """(share of the rate, nothing), or (None, why the rate is not a roof): nothing is faster than what is possible."""
    share = reached / rate.flops_per_s
    if share <= 1:
        return share, ""
    return None, (
        f"no roof measured: torch's product of two large matrices in {rate.precision} is slower here than this "
        f"network, as on a processor that has no arithmetic of that type"
    )


def _find_rate(report: BenchReport, record: CandidateRecord, precision: Precision) -> RooflineRecord | None:
    on_gpu = any(_uses_gpu(settings) for settings in record.settings.values())
    rates = [rate for rate in report.roofline if rate.device == ("cuda" if on_gpu else "cpu")]
    own = [rate for rate in rates if rate.precision is precision]
    return max(own or rates, key=lambda rate: rate.flops_per_s, default=None)


def _uses_gpu(settings: BackendSettings) -> bool:
    return isinstance(settings, TensorRTSettings) or (
        not isinstance(settings, OpenVINOSettings) and settings.device == "cuda"
    )


def split_memory(record: CandidateRecord) -> MemoryParts | None:
    """None where the steps on the way to the peak were not written down."""
    process = max(record.processes, key=lambda each: each.peak_rss_bytes, default=None)
    if process is None or process.rss_imported_bytes is None or process.rss_loaded_bytes is None:
        return None
    libraries = min(process.rss_imported_bytes, process.peak_rss_bytes)
    # Loading may give memory back that importing took: no part is negative, and the sum is the peak.
    loaded = min(max(process.rss_loaded_bytes, libraries), process.peak_rss_bytes)
    return MemoryParts(libraries, loaded - libraries, process.peak_rss_bytes - loaded)


def split_device_memory(row: CandidateSummary) -> DeviceParts | None:
    """None where no runtime or no driver says it."""
    if row.peak_device_bytes is None or not row.device_memory:
        return None
    held = row.device_memory.values()
    weights = sum(memory.weights_bytes for memory in held)
    # They run in turn, and share the largest scratch memory.
    activations = max(memory.activations_bytes or 0 for memory in held)
    buffers = sum(memory.buffers_bytes for memory in held)
    return DeviceParts(weights, activations, buffers, max(0, row.peak_device_bytes - weights - activations - buffers))


def fit_candidate(record: CandidateRecord) -> StepFit | None:
    """Through the samples of all its processes; None where the number of steps was not varied."""
    pooled: dict[int, list[int]] = {}
    for process in record.processes:
        for steps, samples in process.sweep_ns.items():
            pooled.setdefault(steps, []).extend(samples)
    return fit_steps(pooled)


def find_energy(record: CandidateRecord) -> tuple[float, str] | None:
    """Joules per picture, the median of its processes, and who says so; None where nobody does."""
    said = [(each.energy_j, each.energy_source) for each in record.processes if each.energy_j is not None]
    if not said:
        return None
    return statistics.median(joules for joules, _ in said), said[0][1]


def find_layers(report: BenchReport) -> list[LayerFinding]:
    """Empty where `--layers` was not asked for."""
    findings = []
    for record in report.candidates:
        if record.layers:
            first = next((layer for layer in record.layers if layer.relative_error > layer.tolerance), None)
            worst = sorted(record.layers, key=_strain, reverse=True)
            findings.append(LayerFinding(record, len(record.layers), first, tuple(worst[:WORST_LAYERS])))
    return findings


def _strain(layer: LayerRecord) -> float:
    """Error over what rounding explains; where it explains nothing, an error of any size is the worst."""
    if layer.tolerance:
        return layer.relative_error / layer.tolerance
    return math.inf if layer.relative_error else 0.0


def list_processes(report: BenchReport) -> list[tuple[CandidateRecord, ProcessRecord]]:
    """In the order in which they ran."""
    found = [(record, process) for record in report.candidates for process in record.processes]
    return sorted(found, key=lambda each: each[1].position)


def worst_picture(record: CandidateRecord) -> PictureRecord | None:
    """The one whose latents part most from torch's, of those with a cosine for each step."""
    followed = [picture for picture in record.fidelity if picture.latent_cosines]
    return min(followed, key=lambda picture: min(picture.latent_cosines), default=None)
