"""What decides speed besides the code, as one short digest: series of a history never cross it.

sdopt's own version is not part of it, because that is what a nightly run judges. Every recorded library is: those that
build graphs decide what the others have to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from sdopt.disk.digest import digest_of
from sdopt.machine.machine_record import EnvironmentRecord, GpuRecord

_DIGITS = 16
# The kernel keeps some MB for itself, and not the same after every update.
_MEMORY_STEP_BYTES = 1 << 30


def fingerprint_of(environment: EnvironmentRecord, logical_cores: int, memory_bytes: int) -> str:
    """16 hex digits of a SHA-256: system, processor, features, cores, memory in GiB, GPUs, Python's minor version and
    libraries.
    """
    return digest_of(_list_facts(environment, logical_cores, memory_bytes))[:_DIGITS]


class Surroundings(Protocol):
    """What runs, and reports with their machine, say of where they were measured."""

    @property
    def environment(self) -> EnvironmentRecord: ...
    @property
    def logical_cores(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...


def describe_change(before: Surroundings, after: Surroundings) -> tuple[str, ...]:
    """What differs between two environments, as in `torch 2.12 -> 2.13`; empty where their fingerprints are one."""
    older, newer = (_list_facts(run.environment, run.logical_cores, run.memory_bytes) for run in (before, after))
    lines = [f"{name} {older[name]} -> {newer[name]}" for name in _NAMED if older[name] != newer[name]]
    if older["features"] != newer["features"]:
        lines.append(f"processor features {_list_or_none(older['features'])} -> {_list_or_none(newer['features'])}")
    lines += _describe_gpus(before.environment.gpus, after.environment.gpus)
    return (*lines, *_describe_libraries(older["libraries"], newer["libraries"]))


_NAMED = ("system", "processor", "logical cores", "memory GiB", "Python")


def _list_facts(environment: EnvironmentRecord, logical_cores: int, memory_bytes: int) -> dict[str, Any]:
    return {
        "system": environment.system,
        "processor": environment.processor,
        "features": sorted(environment.cpu_features),
        "logical cores": logical_cores,
        "memory GiB": round(memory_bytes / _MEMORY_STEP_BYTES),
        "gpus": [_list_gpu_facts(gpu) for gpu in environment.gpus],
        "Python": ".".join(environment.python.split(".")[:2]),
        "libraries": environment.libraries,
    }


def _list_gpu_facts(gpu: GpuRecord) -> list[Any]:
    return [gpu.name, gpu.generation, round(gpu.memory_bytes / _MEMORY_STEP_BYTES), gpu.driver, gpu.cuda]


def _describe_gpus(before: tuple[GpuRecord, ...], after: tuple[GpuRecord, ...]) -> Iterator[str]:
    if [gpu.name for gpu in before] != [gpu.name for gpu in after]:
        names = [", ".join(gpu.name for gpu in gpus) or "none" for gpus in (before, after)]
        yield f"GPU {names[0]} -> {names[1]}"
        return
    for index, (older, newer) in enumerate(zip(before, after, strict=True)):
        if older.driver != newer.driver:
            which = f" of GPU {index}" if len(before) > 1 else ""
            yield f"NVIDIA driver{which} {older.driver} -> {newer.driver}"
        elif _list_gpu_facts(older) != _list_gpu_facts(newer):
            yield f"memory, generation or CUDA of {older.name}"


def _describe_libraries(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        older, newer = before.get(name, "none"), after.get(name, "none")
        if older != newer:
            yield f"{name} {older} -> {newer}"


def _list_or_none(values: list[str]) -> str:
    return ", ".join(values) or "none"
