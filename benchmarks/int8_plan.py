"""The TensorRT-RTX plan of a UNet with all blocks in INT8, built with no GPU: seconds, bytes, memory, what is in it.

    sdopt convert out/random/sd15 --target rtx:sm89 --no-verify -o out/sd15-rtx
    python benchmarks/int8_plan.py out/sd15-rtx --source out/random/sd15

The layers are those of `configs/quantization/int8.toml`. All inputs get the same scale: neither the builder's work nor
the plan's size depends on it. The child is the one that `convert` builds with. Exits with 3 where a budget is missed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from sdopt.bundle.manifest import read_manifest
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.blocks.write import find_layers, publish_choice, stock_layers
from sdopt.convert.plans.build import JOB, PlanJob, Rung
from sdopt.convert.plans.ladder import MALLOC_ENVIRONMENT
from sdopt.convert.plans.wanted import profile_tables
from sdopt.disk.configs import find_config
from sdopt.graph.qdq import LayerChoice
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import Scheme, parse_quantization
from sdopt.processes.call import call_by_name

_LIMIT_S, _LIMIT_PLAN_BYTES, _LIMIT_RSS_BYTES = 20.0, 950e6, 3.5e9
_AMAX = 4.0


def quantize_unet(bundle: Path, source: str, work: Path) -> tuple[Path, dict[str, Scheme]]:
    """A folder with the quantised graph and weights, and the layers that are quantised."""
    path = find_config("quantization", "int8", "toml")
    settings = parse_quantization(tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
    part = settings.components[ComponentName.UNET]
    stock_folder, made = work / "stock", work / "unet"
    shutil.copytree(bundle / "unet", stock_folder, ignore=shutil.ignore_patterns("*.plan"))
    layers = find_layers(stock_folder)
    choices = {name: LayerChoice(part.scheme) for name in layers if part.group_of(name)}
    scales = work / "scales.safetensors"
    save_file({f"{name}.input_amax": torch.tensor(_AMAX) for name in choices}, scales)
    tensors = open_checkpoint(source).components[ComponentName.UNET].tensors
    stock = stock_layers(stock_folder, DType.FP16, choices, tensors, scales)
    publish_choice(stock, made, choices, "writing the weights of unet")
    shutil.rmtree(stock_folder)
    return made, dict.fromkeys(choices, part.scheme)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--source", required=True, help="The checkpoint that the bundle was made from.")
@click.option("--generation", default="sm89", show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures, the audit and the machine."
)
def main(bundle: Path, source: str, generation: str, json_path: Path | None) -> None:
    manifest = read_manifest(bundle)
    record = manifest.components[ComponentName.UNET]
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        work = Path(folder)
        made, quantized = quantize_unet(bundle, source, work)
        job = PlanJob(
            kind="tensorrt-rtx", component=ComponentName.UNET, precision=Precision.FP16, graph=made / "model.onnx",
            weights=made / "weights.safetensors", output=work / "unet.plan", generation=generation,
            profiles=profile_tables(manifest, ComponentName.UNET),
            attention_layers=record.audit.attention_layers, native=True, require_fused=False, rung=Rung("alone"),
            memory_limit_bytes=None, timing_cache=None, quantized=quantized,
        )  # fmt: skip
        started = time.monotonic()
        outcome = call_by_name(
            "sdopt.convert.plans.build:build_in_child",
            JOB.dump_python(job, mode="json"),
            environment=MALLOC_ENVIRONMENT,
        )
        seconds, plan_bytes = time.monotonic() - started, job.output.stat().st_size
    met = seconds <= _LIMIT_S and plan_bytes <= _LIMIT_PLAN_BYTES and outcome.peak_rss_bytes <= _LIMIT_RSS_BYTES
    print(
        f"{len(quantized)} layers in INT8 for {generation}: {seconds:.1f} s (budget {_LIMIT_S:.0f}), "
        f"{plan_bytes / 1e6:.1f} MB ({_LIMIT_PLAN_BYTES / 1e6:.0f}), "
        f"{outcome.peak_rss_bytes / 1e9:.2f} GB ({_LIMIT_RSS_BYTES / 1e9:.1f}): {'met' if met else 'missed'}"
    )
    print(json.dumps(outcome.value["audit"]["kernels"]))
    if json_path is not None:
        table = {"machine": describe_machine().model_dump(mode="json"), "seconds": round(seconds, 1),
                 "plan_bytes": plan_bytes, "peak_rss_bytes": outcome.peak_rss_bytes, "generation": generation,
                 "layers": len(quantized), "audit": outcome.value["audit"]}  # fmt: skip
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if met else 3)


if __name__ == "__main__":
    main()
