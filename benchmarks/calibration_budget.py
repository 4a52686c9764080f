"""What calibrating a full-size SD1.5 costs: seconds and peak memory, against the budget of ten minutes and 9 GB.

    SDOPT_CACHE=/tmp/cache python benchmarks/calibration_budget.py --work out/budget \
        --json benchmarks/reports/calibration-sd15.json

What ships as `int8` is calibrated on sixteen steps of denoising at 512x512, four trajectories of four steps, and judged
on two held-out trajectories more. "trajectories" draws all six by torch in fp32, and runs the VAE's two networks after
the held-out ones; "scales" runs the UNet on the sixteen recorded inputs once more, while what its layers are given is
counted.

Both rows are fresh processes; the store has no trajectory when the first begins. Memory is the sum of the resident
memory of the process and its child, sampled every 50 ms. The checkpoint has random weights, and its bundle is made
before the clock starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import click
import torch
from export_budget import Row, measure
from torch import nn

from sdopt import progress
from sdopt.bundle.manifest import read_manifest
from sdopt.convert.blocks.calibrate import STAGE as SCALES_STAGE
from sdopt.convert.blocks.calibrate import calibrate
from sdopt.convert.blocks.trajectories import STAGE as TRAJECTORY_STAGE
from sdopt.convert.blocks.trajectories import Trajectories, record_trajectories
from sdopt.convert.decide import open_plan
from sdopt.disk.configs import find_config, find_prompts
from sdopt.disk.store import Store, cache_root
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName, Config
from sdopt.model.quantization import QuantizationSettings, parse_quantization
from sdopt.networks.modules import build_network

_LIMIT_S, _LIMIT_GB = 600.0, 9.0
_RECIPE = {"trajectories": 4, "held_out": 2, "steps": 4}


def read_settings(scales: str) -> QuantizationSettings:
    path = find_config("quantization", "int8", "toml")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    table["calibration"] |= {**_RECIPE, "scales": scales}
    return parse_quantization(table, where=str(path))


def record(bundle: Path, settings: QuantizationSettings) -> Trajectories:
    manifest = read_manifest(bundle)
    prompts = find_prompts(settings.calibration, manifest.recipe.source)
    return record_trajectories(bundle, manifest, Store(), settings.calibration, prompts, cache_root())


def make_scales(bundle: Path, settings: QuantizationSettings) -> Path:
    part = open_plan(read_manifest(bundle).recipe).components[ComponentName.UNET]
    layers = list_layers(part.config, settings)
    return calibrate(part, layers, record(bundle, settings), settings.calibration, Store(), cache_root())


def list_layers(config: Config, settings: QuantizationSettings) -> list[str]:
    """The linear layers and convolutions of the UNet that the settings quantise."""
    with torch.device("meta"):
        network = build_network(ComponentName.UNET, config)
    names = [
        name.removeprefix("network.")
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return [name for name in names if settings.components[ComponentName.UNET].group_of(name)]


def make_bundle(work: Path) -> Path:
    model, bundle = work / "sd15-0", work / "calibration-bundle"
    if not (model / "model_index.json").exists():
        script = Path(__file__).with_name("random_checkpoints.py")
        subprocess.run([sys.executable, script, "sd15", model], check=True)
    command = [sys.executable, "-m", "sdopt", "convert", str(model), "-o", str(bundle), "--target", "cpu"]
    subprocess.run([*command, "--no-verify"], check=True, stderr=subprocess.DEVNULL)
    return bundle


def measure_rows(bundle: Path, scales: str) -> list[Row]:
    for stage in (TRAJECTORY_STAGE, SCALES_STAGE):
        shutil.rmtree(cache_root() / "store" / stage, ignore_errors=True)
    this, rows = [sys.executable, str(Path(__file__).resolve()), "--scales", scales], []
    for case, step in (
        ("trajectories: 24 steps, 2 pictures", "trajectories"),
        (f"scales: 16 steps, {scales}", "scales"),
    ):
        rows.append(Row(f"sd15: {case}", *measure([*this, "--only", step, "--bundle", str(bundle)], cache_root()),
                        None, _LIMIT_GB))  # fmt: skip
        _show(rows[-1])
    rows.append(Row("sd15: both", sum(row.seconds for row in rows), max(row.peak_gb for row in rows),
                    _LIMIT_S, _LIMIT_GB))  # fmt: skip
    _show(rows[-1])
    return rows


def _show(row: Row) -> None:
    verdict = "within" if row.within else "OVER"
    print(f"{row.case}: {row.seconds:.1f} s, {row.peak_gb:.2f} GB {verdict}", file=sys.stderr, flush=True)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/budget"), show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle of SD1.5, instead of one that is made.")
@click.option("--scales", type=click.Choice(["max", "percentile", "entropy"]), default="percentile", show_default=True)
@click.option("--only", type=click.Choice(["trajectories", "scales"]), hidden=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows and the machine.")
def main(work: Path, bundle: Path | None, scales: str, only: str | None, json_path: Path | None) -> None:
    if only is not None:
        assert bundle is not None
        with progress.shown_on_stderr():
            (record if only == "trajectories" else make_scales)(bundle, read_settings(scales))
        return
    if bundle is None:
        work.mkdir(parents=True, exist_ok=True)
        bundle = make_bundle(work)
    load = os.getloadavg()[2]
    rows = measure_rows(bundle, scales)
    if json_path is not None:
        table = {
            "load_before": load,
            "machine": describe_machine().model_dump(mode="json"),
            "rows": [{**asdict(row), "within": row.within} for row in rows],
        }
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
