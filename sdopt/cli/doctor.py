"""`sdopt doctor`: what runs here."""

from __future__ import annotations

import dataclasses
import json

import rich_click as click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the probes as JSON on stdout.")
def doctor(as_json: bool) -> None:
    """Say which runtimes work on this machine, in which precisions, and how to get the others."""
    from sdopt.artifacts.machine import describe_machine
    from sdopt.artifacts.store import cache_root
    from sdopt.backends.open import fastest_cpu_settings, probe_all
    from sdopt.model.precision import Precision

    machine, probes = describe_machine(), probe_all()
    choice = fastest_cpu_settings(Precision.AUTO)
    if as_json:
        table = {
            "machine": machine.model_dump(mode="json"),
            "backends": [dataclasses.asdict(probe) for probe in probes],
            "cpu_target": choice.model_dump(mode="json"),
            "cache": str(cache_root()),
        }
        print(json.dumps(table))
        return
    from rich.console import Console
    from rich.table import Table

    table_view = Table("backend", "version", "computes in", "missing", "how to get it")
    for probe in probes:
        table_view.add_row(probe.backend, probe.version, ", ".join(probe.precisions), probe.missing, probe.remedy)
    console = Console(stderr=True)
    console.print(
        f"{machine.processor} ({', '.join(machine.cpu_features) or 'no vector features known'}), {machine.system}"
    )
    console.print(f"Python {machine.python}; " + ", ".join(f"{k} {v}" for k, v in machine.libraries.items()))
    console.print(table_view)
    precision = getattr(choice, "inference_precision", Precision.FP32)
    console.print(f"--target cpu takes {choice.kind} in {precision} here; the cache is {cache_root()}")
