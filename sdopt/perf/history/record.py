"""`RunRecord`: what one run of a suite measured, as a line of the history. Raw samples are the record.

The format is an API: `schema_version` counts its changes, a newer one and unknown keys are refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdopt.bench.case.report import Conditions
from sdopt.machine.machine_record import EnvironmentRecord

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # Equal pictures have an infinite PSNR, which JSON has no number for.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Metric(StrEnum):
    """What a series follows. Times are in ns, sizes in bytes, PSNR in dB, SSIM has no unit."""

    END_TO_END = "end_to_end"
    UNET_STEP = "unet_step"
    TEXT_ENCODER = "text_encoder"
    VAE_DECODER = "vae_decoder"
    VAE_ENCODER = "vae_encoder"
    OVERHEAD = "overhead"
    FIRST_STEP = "first_step"
    COLD_START = "cold_start"
    LOAD = "load"
    PEAK_MEMORY = "peak_memory"
    DEVICE_MEMORY = "device_memory"
    BUNDLE_SIZE = "bundle_size"
    BUILD = "build"
    PSNR = "psnr"
    SSIM = "ssim"

    @property
    def kind(self) -> MetricKind:
        return _KINDS.get(self, MetricKind.TIME)


class MetricKind(StrEnum):
    """Which rule of the gate holds for a metric."""

    TIME = "time"
    """Sampled many times a night: screened against its history, and confirmed."""
    START = "start"
    """Times with one sample a process, which the disk's cache moves: recorded and shown, never an alarm."""
    MEMORY = "memory"
    SIZE = "size"
    BUILD = "build"
    PSNR = "psnr"
    SSIM = "ssim"


_KINDS = {
    Metric.COLD_START: MetricKind.START,
    Metric.LOAD: MetricKind.START,
    Metric.PEAK_MEMORY: MetricKind.MEMORY,
    Metric.DEVICE_MEMORY: MetricKind.MEMORY,
    Metric.BUNDLE_SIZE: MetricKind.SIZE,
    Metric.BUILD: MetricKind.BUILD,
    Metric.PSNR: MetricKind.PSNR,
    Metric.SSIM: MetricKind.SSIM,
}


class SeriesKey(_Record):
    """What is followed from night to night; `str` is its name in tables and exports."""

    case: str
    candidate: str
    metric: Metric

    def __str__(self) -> str:
        return f"{self.case}/{self.candidate}/{self.metric}"


class SeriesRecord(_Record):
    """The raw samples of one series in one run, a group for each process, in the metric's unit."""

    key: SeriesKey
    groups: tuple[tuple[float, ...], ...] = Field(min_length=1)


class FailureRecord(_Record):
    """A candidate (or with an empty name the whole case) that could not be measured."""

    case: str
    candidate: str
    message: str


class RunKind(StrEnum):
    NIGHTLY = "nightly"
    BRIDGE = "bridge"
    """The last good commit, measured again in a new environment: the first point of its series."""
    MANUAL = "manual"


class RunRecord(_Record):
    """One line of the history. `fingerprint` is `sdopt.perf.history.fingerprint`'s of the environment below."""

    schema_version: Literal[1] = 1
    id: str
    """Sortable by time and unique: `20260102T030405Z-` and eight hex digits."""
    created_utc: str
    kind: RunKind
    suite: str
    suite_digest: str
    """SHA-256 of the suite file: another suite's figures are not this one's."""
    commit: str
    """Full hash, or empty outside of a repository."""
    changed: bool
    """Whether the working tree differed from the commit."""
    fingerprint: str
    environment: EnvironmentRecord
    logical_cores: int
    memory_bytes: int
    digests: dict[str, str]
    """By case, the SHA-256 of the measured bundle's manifest."""
    dirty: tuple[str, ...]
    """Why the times are not to be believed: a neighbour, heat, a changed clock. Empty where they are."""
    conditions: Conditions
    series: tuple[SeriesRecord, ...]
    failures: tuple[FailureRecord, ...] = ()
    wall_ns: int = 0
    verdict: Literal["", "pass", "alarm"] = ""
    """What the gate said of it, where it was asked: the last good commit is that of the last run that passed."""

    @model_validator(mode="after")
    def _once_each(self) -> RunRecord:
        if len({series.key for series in self.series}) < len(self.series):
            raise ValueError(f"{self.id} has a series twice")
        return self

    def find(self, key: SeriesKey) -> SeriesRecord | None:
        return next((series for series in self.series if series.key == key), None)
