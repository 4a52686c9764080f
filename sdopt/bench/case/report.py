"""`BenchReport`: what a run of the bench measured. Raw samples are the record; statistics are derived from
them.

The format is an API: `schema_version` counts its changes, a newer one and unknown keys are refused.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdopt.bundle.records import ImageFidelity, QuantizationRecord
from sdopt.disk.files import write_file
from sdopt.errors import ArtifactError
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.model.backend_settings import BackendSettings
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraUse
from sdopt.model.precision import Precision

SCHEMA_VERSION = 4
_LIMIT_BYTES = 256 << 20
# 5 % of a core. The bookkeeping of an idle machine takes less; a second program that computes, twenty times as much.
NEIGHBOURS_ALLOWED_CORES = 0.05


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(StrEnum):
    """A part of drawing a picture, as one sample times it. In the order in which they run."""

    TEXT_ENCODER = "text_encoder"
    """Every call of the text encoders."""
    VAE_ENCODER = "vae_encoder"
    UNET_STEP = "unet_step"
    """One call of the UNet: one step of most schedulers."""
    VAE_DECODER = "vae_decoder"
    OVERHEAD = "overhead"
    """All that is not a network, per picture: scheduler, loop, tokenizer, copies."""
    END_TO_END = "end_to_end"
    """Prompt to pixels, for one call of the pipeline."""
    FIRST_STEP = "first_step"
    """From the start of a call to the end of its first denoising step. It overlaps the stages above."""


class Scope(StrEnum):
    """What a sample covers."""

    PICTURES = "pictures"
    """Whole calls of the pipeline."""
    UNET = "unet"
    """The UNet alone, one guided step at a time, on parity's inputs: for networks too large to draw with each night."""

    @property
    def stage(self) -> Stage:
        """Whose samples decide what is faster."""
        return Stage.END_TO_END if self is Scope.PICTURES else Stage.UNET_STEP


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


class CaseRecord(_Record):
    """What was drawn. `digest` is the SHA-256 of the bundle's manifest, which names the digest of every
    file.
    """

    bundle: str
    digest: str
    bundle_bytes: int
    family: str
    width_px: int
    height_px: int
    batch: int
    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str = ""
    quantization: dict[ComponentName, QuantizationRecord] = Field(default_factory=dict)
    """What was tried on each component of the bundle, and what of it stayed."""
    scope: Scope = Scope.PICTURES
    inputs_digest: str = ""
    """SHA-256 of the file with the initial latents (and picture), which every candidate was given."""
    loras: tuple[LoraUse, ...] = ()
    """What acted on every picture, with the files' digests."""
    flops: dict[ComponentName, int] = Field(default_factory=dict)
    """Of one run of each component at these sizes: 2 x multiply-accumulates."""


class MethodRecord(_Record):
    """How it was measured. `order` names the candidate of each process, in the order in which they ran.

    After the cold start a process draws until the medians of two windows of `settle_window` calls differ by less than
    `settle_tolerance`, or `most_warm_up` calls; then it times `least_pictures` to `most_pictures` calls.
    """

    repeats: int
    least_pictures: int
    most_pictures: int
    picture_budget_s: float
    time_limit_s: float
    order: tuple[str, ...]
    command: str
    settle_window: int = 0
    settle_tolerance: float = 0.0
    most_warm_up: int = 0
    suite: str = ""
    """Name of the suite that asked for it, or nothing."""


class Conditions(_Record):
    """What the machine did while a process, or the whole run, was measured; null where the system does not say."""

    neighbours_cores: float = 0.0
    """How many cores other processes kept busy, on average: times taken beside a neighbour say little."""
    clock_mhz: tuple[float, float] | None = None
    """Least and greatest clock of the fastest core (or of the GPU's multiprocessors), as means over whole calls."""
    throttled: int | None = None
    """Times that the processor or the GPU slowed down because it was too hot or took too much power."""
    steal_cores: float | None = None
    """Cores' worth of time that a virtual machine was denied by its host."""
    clock_steps: int = 0
    """Times that the clock of the samples went back: those samples are dropped."""

    @property
    def was_shared(self) -> bool:
        return self.neighbours_cores > NEIGHBOURS_ALLOWED_CORES


class MachineRecord(_Record):
    """What the environment record does not hold; `conditions` are those of the whole run."""

    logical_cores: int
    memory_bytes: int
    conditions: Conditions = Conditions()


class RooflineRecord(_Record):
    """What this machine reached in the same run: the product of two large square matrices, and a copy."""

    device: str
    """`cpu` or `cuda`."""
    precision: Precision
    flops_per_s: float
    """2 x multiply-accumulates of the product, per second; the best of several."""
    copy_bytes_per_s: float
    """Bytes read plus bytes written of a copy that fits no cache, per second."""


class DeviceMemoryRecord(_Record):
    """What one open engine holds of a GPU, as its runtime says: `sdopt.backends.protocol.DeviceMemory`.

    TensorRT says no more of a context than its scratch memory; its kernels are only in the process's peak.
    """

    weights_bytes: int
    activations_bytes: int | None
    """Scratch memory while it runs; null where the runtime does not say. Engines that run in turn share the largest."""
    buffers_bytes: int
    """Inputs and outputs that each context keeps."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + (self.activations_bytes or 0) + self.buffers_bytes


class ProcessRecord(_Record):
    """One fresh process. Cold start counts from its launch to its first picture: import, load, compile,
    draw.
    """

    position: int
    """Place in `MethodRecord.order`."""
    import_ns: int
    """Launch of the process to the first line of the bench's own code."""
    load_ns: int
    first_picture_ns: int
    cold_start_ns: int
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    """All that the process held of its GPU at the peak, as NVML says; null on the CPU and where NVML is not."""
    torch_peak_device_bytes: int | None = None
    """What of it torch's allocator held: TensorRT's weights are not its own."""
    device_memory: dict[ComponentName, DeviceMemoryRecord] = Field(default_factory=dict)
    """By component, after the last picture; those whose runtime does not say are left out, as on the CPU."""
    samples_ns: dict[Stage, tuple[int, ...]]
    warm_up_ns: tuple[int, ...] = ()
    """Calls after the cold start that were drawn and not counted."""
    settled: bool = True
    """False where the medians still moved at the end of the warm-up."""
    sweep_ns: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    """End-to-end samples by number of steps: a line through them separates the fixed cost from that of a step."""
    energy_j: float | None = None
    """Joules per picture (in the scope `unet` per step) over the timed calls; null where neither RAPL nor NVML says."""
    energy_source: str = ""
    """`rapl` (processor packages, all that runs on them) or `nvml` (the GPU)."""
    rss_imported_bytes: int | None = None
    """Resident memory before anything was opened: Python and the libraries."""
    rss_loaded_bytes: int | None = None
    """With every component open, before the first picture."""
    conditions: Conditions = Conditions()


class PictureRecord(ImageFidelity):
    """A picture against torch fp32's from the same initial latents, by more figures than a verdict needs."""

    latent_cosines: tuple[float, ...] = ()
    """Of the latents after each step."""
    ciede2000_mean: float | None = None
    """Mean colour difference over the pixels (CIEDE2000; about 1 can just be seen)."""
    ciede2000_p99: float | None = None
    lpips: float | None = None
    """Null where no weights were given, as for the next."""
    clip_score: float | None = None


class ComponentErrorRecord(_Record):
    """A component's outputs against torch fp32's on parity's seeded inputs."""

    relative_error: float
    """Norm of the difference over the norm of torch's output."""
    max_error: float
    cosine: float


class LayerRecord(_Record):
    """A layer of an engine's graph against torch's module of the same name, in the order of the graph."""

    component: ComponentName
    layer: str
    relative_error: float
    tolerance: float
    """What rounding of the engine's precision explains at this depth."""


class CandidateKind(StrEnum):
    ENGINES = "engines"
    """Engines of the bundle that is measured."""
    TORCH = "torch"
    BUNDLE = "bundle"
    """Engines of another bundle."""
    PEER = "peer"
    """Another tool, in an environment of its own."""


class CandidateRecord(_Record):
    """A candidate, its processes and its pictures against torch fp32. A failure is a record with its
    message.
    """

    name: str
    label: str
    precision: Precision
    """The coarsest that it computes in."""
    settings: dict[ComponentName, BackendSettings]
    precisions: dict[ComponentName, Precision] = Field(default_factory=dict)
    """What the products of each component compute in, where that is known."""
    status: Status
    message: str = ""
    processes: tuple[ProcessRecord, ...] = ()
    fidelity: tuple[PictureRecord, ...] = ()
    kind: CandidateKind = CandidateKind.TORCH
    digest: str = ""
    """SHA-256 of the manifest of the bundle that it opened."""
    size_bytes: int | None = None
    """On disk: what it needs to draw. Null where it has no files of its own."""
    build_ns: int | None = None
    """What building it took, as its bundle's manifest says."""
    errors: dict[ComponentName, ComponentErrorRecord] = Field(default_factory=dict)
    fid: float | None = None
    layers: tuple[LayerRecord, ...] = ()
    """Filled by `--layers`."""

    @model_validator(mode="after")
    def _explained(self) -> CandidateRecord:
        if self.status is not Status.OK and not self.message:
            raise ValueError(f"{self.name} is {self.status} without a message")
        return self

    def samples_of(self, stage: Stage) -> tuple[tuple[int, ...], ...]:
        """Samples in ns, grouped by process; empty where the stage never ran."""
        groups = (process.samples_ns.get(stage, ()) for process in self.processes)
        return tuple(group for group in groups if group)


class BenchReport(_Record):
    schema_version: Literal[4] = 4
    created_utc: str
    case: CaseRecord
    environment: EnvironmentRecord
    machine: MachineRecord
    method: MethodRecord
    candidates: tuple[CandidateRecord, ...] = Field(min_length=1)
    roofline: tuple[RooflineRecord, ...] = ()
    plugins: dict[str, str] = Field(default_factory=dict)
    """LPIPS, CLIP score and FID: with which weights (their SHA-256), or why not measured."""
    audits: dict[str, dict[ComponentName, str]] = Field(default_factory=dict)
    """By candidate and component, what the manifest's audit says in a line."""
    notes: tuple[str, ...] = ()
    """What of the report could not be measured, and why."""

    def candidate(self, name: str) -> CandidateRecord | None:
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


def write_report(path: Path, report: BenchReport) -> None:
    write_file(path, report.to_json())


def read_report(path: Path) -> BenchReport:
    """Read a report. Raises `ArtifactError` for a missing or damaged file, a newer schema and unknown
    keys.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ArtifactError(f"{path} is larger than any report")
        values: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="run sdopt bench again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {version}, and this sdopt reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade sdopt",
        )
    if version in (1, 2, 3):  # before GPUs, before quantised blocks, and before conditions
        values = _migrate(values)
    try:
        return BenchReport.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="run sdopt bench again") from error


def _migrate(values: dict[str, Any]) -> dict[str, Any]:
    """To schema 4, where a machine's neighbours became one of its conditions and the engines' kind is written."""
    machine = dict(values.get("machine", {}))
    machine["conditions"] = {"neighbours_cores": machine.pop("neighbours_cores", 0.0)}
    kinds = {"engines": CandidateKind.ENGINES.value}
    candidates = [{"kind": kinds.get(c.get("name", ""), "torch"), **c} for c in values.get("candidates", ())]
    return {**values, "schema_version": SCHEMA_VERSION, "machine": machine, "candidates": candidates}
