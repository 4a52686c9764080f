"""One guided step of a UNet in INT8: against the same UNet in 16 bits, and against torch eager fp32, in one run.

    python benchmarks/random_checkpoints.py sd15 out/sd15 --seed 1
    sdopt convert out/sd15 --precision int8 -o out/sd15-int8
    sdopt convert out/sd15 --precision bf16 --no-verify -o out/sd15-bf16
    python benchmarks/int8_step.py out/sd15-int8 out/sd15-bf16

Each candidate has fresh processes, interleaved A B C C B A, with two warm-up runs in each; the figures are medians over
all timed runs. The error is |a-b|/|b| against torch fp32 on parity's seeded inputs. Exits with 3 where one is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click

from sdopt.bundle.manifest import read_manifest
from sdopt.fidelity.candidate import dump_settings, parse_settings
from sdopt.machine.environment import describe_machine
from sdopt.model.backend_settings import BackendSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.processes.call import How, call
from sdopt.processes.channel import JsonTable

_INT8 = "int8"
_RATIOS = {"16 bits": 1.6, "torch eager fp32": 3.8}
_ERROR = 0.05
_WARM_UP, _TIMED = 2, 4


def time_in_child(arguments: JsonTable) -> JsonTable:
    """Open the UNet with the given settings, time it, and keep what it gives for parity's inputs."""
    from safetensors.torch import save_file

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
            outputs = session.run(inputs)
            if run >= _WARM_UP:
                samples_ns.append(time.perf_counter_ns() - started)
    save_file({name: tensor.float().contiguous() for name, tensor in outputs.items()}, arguments["output"])
    return {"samples_ns": samples_ns}


def measure_error(expected: Path, actual: Path) -> float:
    from safetensors.torch import load_file

    wanted, found = load_file(expected), load_file(actual)
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


@click.command()
@click.argument("quantized", type=click.Path(path_type=Path, exists=True))
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write samples, ratios and the machine.")
def main(quantized: Path, base: Path, json_path: Path | None) -> None:
    records = {folder: read_manifest(folder).components[ComponentName.UNET] for folder in (quantized, base)}
    record = records[quantized].quantization
    candidates: dict[str, tuple[Path, BackendSettings]] = {
        _INT8: (quantized, records[quantized].backend),
        "16 bits": (base, records[base].backend),
        "torch eager fp32": (base, TorchSettings()),
    }
    samples: dict[str, list[int]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as work:
        outputs = {name: Path(work) / f"{name}.safetensors" for name in candidates}
        for name in [*candidates, *reversed(candidates)]:
            folder, settings = candidates[name]
            arguments = {"folder": str(folder), "settings": dump_settings(settings), "output": str(outputs[name])}
            outcome = call(time_in_child, arguments, how=How.FRESH)
            samples[name] += outcome.value["samples_ns"]
            peaks[name] = max(peaks.get(name, 0), outcome.peak_rss_bytes)
            print(f"{name}: {[round(s / 1e9, 2) for s in outcome.value['samples_ns']]} s", file=sys.stderr, flush=True)
        errors = {name: measure_error(outputs["torch eager fp32"], outputs[name]) for name in candidates}
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {name: medians[name] / medians[_INT8] for name in candidates}
    missed = [name for name, budget in _RATIOS.items() if ratios[name] < budget]
    for name in candidates:
        budget = f", budget {_RATIOS[name]}x {'missed' if name in missed else 'met'}" if name in _RATIOS else ""
        print(
            f"{name}: {medians[name] / 1e9:.2f} s, {ratios[name]:.2f}x of int8{budget}; error {errors[name]:.2%}; "
            f"peak {peaks[name] / 1e9:.1f} GB"
        )
    print(f"error budget {_ERROR:.0%} {'met' if errors[_INT8] <= _ERROR else 'missed'}")
    print(record.describe() if record else "nothing is quantised")
    if json_path is not None:
        table = {"machine": describe_machine().model_dump(mode="json"), "samples_ns": samples, "ratios": ratios,
                 "errors": errors, "quantization": record and record.model_dump(mode="json")}  # fmt: skip
        json_path.write_text(json.dumps({**table, "peak_rss_bytes": peaks}, indent=1) + "\n", encoding="utf-8")
    sys.exit(3 if missed or errors[_INT8] > _ERROR else 0)


if __name__ == "__main__":
    main()
