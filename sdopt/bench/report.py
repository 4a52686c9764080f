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

from sdopt.artifacts.files import write_file
from sdopt.artifacts.manifest import EnvironmentRecord, ImageFidelity, QuantizationRecord
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import BackendSettings

SCHEMA_VERSION = 3
_LIMIT_BYTES = 256 << 20
# The bookkeeping of an idle desktop takes less; a second program that computes takes ten times as much.
NEIGHBOURS_ALLOWED_CORES = 0.1


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


class MethodRecord(_Record):
    """How it was measured. `order` names the candidate of each process, in the order in which they ran."""

    repeats: int
    least_pictures: int
    most_pictures: int
    picture_budget_s: float
    time_limit_s: float
    order: tuple[str, ...]
    command: str


class MachineRecord(_Record):
    """What the environment record does not hold. `neighbours_cores` is how many cores other processes kept busy, on
    average over the run: times taken beside a neighbour say little.
    """

    logical_cores: int
    memory_bytes: int
    neighbours_cores: float

    @property
    def was_shared(self) -> bool:
        return self.neighbours_cores > NEIGHBOURS_ALLOWED_CORES


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


class CandidateRecord(_Record):
    """A candidate, its processes and its pictures against torch fp32. A failure is a record with its
    message.
    """

    name: str
    label: str
    precision: Precision
    """The coarsest that it computes in."""
    settings: dict[ComponentName, BackendSettings]
    status: Status
    message: str = ""
    processes: tuple[ProcessRecord, ...] = ()
    fidelity: tuple[ImageFidelity, ...] = ()

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
    schema_version: Literal[3] = 3
    created_utc: str
    case: CaseRecord
    environment: EnvironmentRecord
    machine: MachineRecord
    method: MethodRecord
    candidates: tuple[CandidateRecord, ...] = Field(min_length=1)

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
    if version in (1, 2):  # before GPUs, and before quantised blocks
        values = {**values, "schema_version": SCHEMA_VERSION}
    try:
        return BenchReport.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="run sdopt bench again") from error
