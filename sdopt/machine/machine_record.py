"""What a machine is, as a manifest and a report keep it."""

from __future__ import annotations

from typing import Literal

from sdopt.disk.digest import Record

PlanFlavour = Literal["tensorrt-rtx", "tensorrt"]


class GpuRecord(Record):
    """A GPU as its driver shows it; `generation` is its compute capability, as in `sm89`."""

    name: str
    generation: str
    memory_bytes: int
    driver: str
    cuda: str
    """The newest CUDA that the driver knows, as in `13.0`."""


class EnvironmentRecord(Record):
    """The machine and libraries that made the bundle; `cpu_features` are those that the engines' precision needs."""

    sdopt: str
    python: str
    system: str
    processor: str
    cpu_features: tuple[str, ...]
    libraries: dict[str, str]
    gpus: tuple[GpuRecord, ...] = ()
