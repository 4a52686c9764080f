"""`sdopt doctor`: what runs here."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from sdopt.machine.gpus import Gpu


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the probes as JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Say which runtimes and GPUs work on this machine, and how to get the others.

    The precisions are those that a runtime computes in here; the GPU generations those that plans can be built for.
    """
    from sdopt.backends.probes import fastest_cpu_settings, probe_all
    from sdopt.disk.store import cache_root
    from sdopt.machine.environment import describe_machine
    from sdopt.machine.gpus import find_gpus
    from sdopt.model.precision import Precision

    machine, probes, gpus, buildable = describe_machine(), probe_all(), find_gpus(), _list_buildable()
    choice = fastest_cpu_settings(Precision.AUTO)
    if as_json:
        table = {
            "machine": machine.model_dump(mode="json"),
            "gpus": [{**gpu.record.model_dump(mode="json"), "free_bytes": gpu.free_bytes} for gpu in gpus],
            "backends": [dataclasses.asdict(probe) for probe in probes],
            "builds_for": buildable,
            "cpu_target": choice.model_dump(mode="json"),
            "cache": str(cache_root()),
        }
        print(json.dumps(table))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table_view = Table("backend", "version", "computes in", "missing", "how to get it")
    for probe in probes:
        cells = (probe.backend, probe.version, ", ".join(probe.precisions), probe.missing, probe.remedy)
        table_view.add_row(*(escape(cell) for cell in cells))  # a remedy has an extra's name in brackets
    console = Console(stderr=True)
    console.print(
        f"{machine.processor} ({', '.join(machine.cpu_features) or 'no vector features known'}), {machine.system}"
    )
    for line in [_describe_gpu(gpu) for gpu in gpus] or ["no NVIDIA GPU with a driver"]:
        console.print(line, markup=False)
    console.print(f"Python {machine.python}; " + ", ".join(f"{k} {v}" for k, v in machine.libraries.items()))
    console.print(table_view)
    for flavour, generations in buildable.items():
        console.print(f"{flavour} builds plans here for {', '.join(generations)}", markup=False)
    precision = getattr(choice, "inference_precision", Precision.FP32)
    console.print(f"--target cpu takes {choice.kind} in {precision} here; the cache is {cache_root()}")


def _list_buildable() -> dict[str, list[str]]:
    """GPU generations that each installed TensorRT builds plans for here; general TensorRT only for the GPU it sees."""
    from sdopt.backends.tensorrt.loading import buildable_generations
    from sdopt.errors import MissingDependency
    from sdopt.machine.environment import find_machine
    from sdopt.model.target import PORTABLE

    machine = find_machine()
    found: dict[str, list[str]] = {}
    for flavour in machine.libraries:
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
