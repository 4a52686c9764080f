"""`sdopt doctor`: what runs here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich_click as click

from sdopt.cli.text import neutralise

if TYPE_CHECKING:
    from sdopt.backends.protocol import Probe
    from sdopt.machine.gpus import Gpu


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the probes as JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Say which runtimes and GPUs work on this machine, and how to get the others.

    The precisions are those that a runtime computes in here; the GPU generations those that plans can be built for.
    """
    from sdopt.backends.probes import choose_cpu_settings, probe_all
    from sdopt.disk.store import cache_root
    from sdopt.machine.environment import describe_machine
    from sdopt.machine.gpus import find_gpus
    from sdopt.machine.library_pairs import find_mismatches
    from sdopt.model.precision import Precision

    machine, probes, gpus = describe_machine(), probe_all(), find_gpus()
    buildable = _list_buildable(probes)
    openvino = next(probe for probe in probes if probe.backend == "openvino")
    choice = choose_cpu_settings(openvino, Precision.AUTO)
    mismatches = find_mismatches()
    if as_json:
        table = {
            "machine": machine.model_dump(mode="json"),
            "gpus": [{**gpu.record.model_dump(mode="json"), "free_bytes": gpu.free_bytes} for gpu in gpus],
            "backends": [dataclasses.asdict(probe) for probe in probes],
            "mismatches": [dataclasses.asdict(mismatch) for mismatch in mismatches],
            "builds_for": buildable,
            "cpu_target": choice.model_dump(mode="json"),
            "cache": str(cache_root()),
        }
        print(json.dumps(table))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table_view = Table("backend", "version", "computes in", "missing")
    for probe in probes:
        cells = (probe.backend, probe.version, ", ".join(probe.precisions), probe.missing)
        table_view.add_row(*(escape(cell) for cell in cells))
    console = Console(stderr=True)
    features = ", ".join(machine.cpu_features) or "no vector features known"
    console.print(f"{machine.processor} ({features}), {machine.system}", markup=False)
    for line in [_describe_gpu(gpu) for gpu in gpus] or ["no NVIDIA GPU with a driver"]:
        console.print(line, markup=False)
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    console.print(f"Python {machine.python}; {libraries}", markup=False)
    console.print(table_view)
    # Below the table, where a command is one line that can be copied.
    for probe in probes:
        if probe.remedy:
            print(neutralise(f"{probe.backend}:\n  {probe.remedy}"), file=sys.stderr)
    for mismatch in mismatches:
        print(neutralise(f"{mismatch.sentence}:\n  {mismatch.command}"), file=sys.stderr)
    for flavour, generations in buildable.items():
        console.print(f"{flavour} builds plans here for {', '.join(generations)}", markup=False)
    precision = getattr(choice, "inference_precision", Precision.FP32)
    console.print(f"--target cpu takes {choice.kind} in {precision} here; the cache is {cache_root()}", markup=False)


def _list_buildable(probes: Sequence[Probe]) -> dict[str, list[str]]:
    """GPU generations that each installed TensorRT builds plans for here; general TensorRT only for the GPU it sees.

    One that a probe could not import is left out: it is not imported here either.
    """
    from sdopt.backends.tensorrt.loading import buildable_generations
    from sdopt.errors import MissingDependency
    from sdopt.machine.environment import find_machine
    from sdopt.model.target import PORTABLE

    machine = find_machine()
    found: dict[str, list[str]] = {}
    broken = {probe.backend for probe in probes if not probe.version}
    for flavour in machine.libraries:
        if flavour in broken:
            continue
        try:
            ahead = buildable_generations(flavour)
        except MissingDependency:  # the package is there, and a library that it loads is not: the table says so
            continue
        found[flavour] = [*ahead, PORTABLE] if ahead else [gpu.generation for gpu in machine.gpus[:1]]
    return {flavour: generations for flavour, generations in found.items() if generations}


def _describe_gpu(gpu: Gpu) -> str:
    record = gpu.record
    memory = f"{record.memory_bytes / 1e9:.1f} GB, {gpu.free_bytes / 1e9:.1f} GB of them free"
    return (
        f"{record.name} ({record.generation}), {memory if record.memory_bytes else 'memory not known'}, "
        f"driver {record.driver}, CUDA {record.cuda}"
    )
