"""One guided step of a bundle's UNet: the engine against torch eager in fp32 and bf16, in one run.

    sdopt convert out/random/sd15 --no-verify -o out/sd15
    python benchmarks/unet_step.py out/sd15

Each candidate has fresh processes, interleaved A B C C B A, with two warm-up runs in each; the figures are medians over
all timed runs. Compare ratios, never seconds from different runs. Exits with 3 where a ratio misses its budget.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import click

from sdopt.bundle.manifest import read_manifest
from sdopt.fidelity.candidate import dump_settings, parse_settings
from sdopt.machine.environment import describe_machine
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.processes.call import How, call
from sdopt.processes.channel import JsonTable

_BUDGETS = {"torch eager fp32": 2.4, "torch eager bf16": 1.35}
_WARM_UP, _TIMED = 2, 3


def time_in_child(arguments: JsonTable) -> JsonTable:
    """Open the UNet with the given settings and time it; the inputs are parity's."""
    from sdopt.backends.component_files import component_files
    from sdopt.backends.open import open_session
    from sdopt.trace.seeded_inputs import make_inputs

    folder = Path(arguments["folder"])
    files = component_files(folder, read_manifest(folder), ComponentName.UNET)
    inputs = make_inputs(files.spec, files.config, files.extents)
    settings = parse_settings(arguments["settings"])
    assert settings is not None
    samples_ns = []
    with open_session(files, settings) as session:
        for run in range(_WARM_UP + _TIMED):
            started = time.perf_counter_ns()
            session.run(inputs)
            if run >= _WARM_UP:
                samples_ns.append(time.perf_counter_ns() - started)
    return {"samples_ns": samples_ns}


def list_candidates(folder: Path) -> dict[str, BackendSettings]:
    record = read_manifest(folder).components[ComponentName.UNET]
    engine = f"{record.backend.kind} {record.precision}"
    return {
        engine: record.backend,
        "torch eager fp32": TorchSettings(),
        "torch eager bf16": TorchSettings(precision=Precision.BF16),
        "onnxruntime fp32": OnnxRuntimeSettings(),
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write samples, ratios and the machine.")
def main(folder: Path, json_path: Path | None) -> None:
    candidates = list_candidates(folder)
    samples: dict[str, list[int]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    for name in [*candidates, *reversed(candidates)]:
        arguments = {"folder": str(folder), "settings": dump_settings(candidates[name])}
        outcome = call(time_in_child, arguments, how=How.FRESH)
        samples[name] += outcome.value["samples_ns"]
        peaks[name] = max(peaks.get(name, 0), outcome.peak_rss_bytes)
        print(f"{name}: {[round(s / 1e9, 2) for s in outcome.value['samples_ns']]} s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    engine = next(iter(candidates))
    ratios = {name: medians[name] / medians[engine] for name in candidates}
    missed = [name for name, budget in _BUDGETS.items() if ratios[name] < budget]
    for name in candidates:
        budget = f", budget {_BUDGETS[name]}x {'missed' if name in missed else 'met'}" if name in _BUDGETS else ""
        seconds, peak_gb = medians[name] / 1e9, peaks[name] / 1e9
        print(f"{name}: {seconds:.2f} s, {ratios[name]:.2f}x of {engine}{budget}; peak {peak_gb:.1f} GB")
    if json_path is not None:
        table = {"machine": describe_machine().model_dump(mode="json"), "samples_ns": samples, "ratios": ratios}
        json_path.write_text(json.dumps({**table, "peak_rss_bytes": peaks}, indent=1) + "\n", encoding="utf-8")
    sys.exit(3 if missed else 0)


if __name__ == "__main__":
    main()
