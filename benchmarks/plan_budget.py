"""What building TensorRT-RTX plans of full-size networks costs with no GPU: seconds, peak memory, and the budgets.

    python benchmarks/plan_budget.py sd15 sdxl --work out/budget --json benchmarks/reports/plans.json

The graphs and weights are made at the start of each run, before the clock starts; every row is a fresh process with no
plan in the store. The seconds of the rows of plans are those of the stage that builds them, without the start of Python
and the opening of the checkpoint before it; `plans` in the JSON are the records that the row of all plans wrote. Memory
is the sum of the resident memory of the process and all its children, sampled every 50 ms.

The memory of an idle virtual machine is slow when it is first touched. "UNet plan again" builds the first row's plan
once more at the end, from the second checkpoint: the same network with other weights.

What a row leaves is removed before the next: at most twice the size of a checkpoint lies in the work folder, beside the
two checkpoints, which stay for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from export_budget import Row, measure

from sdopt.bundle.manifest import read_manifest
from sdopt.convert.decide import open_plan
from sdopt.convert.plans.build import JOB, PlanJob, Rung
from sdopt.convert.plans.ladder import MALLOC_ENVIRONMENT, STAGE, make_plans
from sdopt.disk.store import Store
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.processes.call import call_by_name

_BUDGETS = {"sd15": (30.0, 5.7), "sdxl": (None, None)}
_UNET_BUDGETS = {"sd15": (None, None), "sdxl": (60.0, 16.0)}
_TARGET = "rtx:sm89"
_NOTED_NAME = "stage.json"

PlanTable = dict[str, Any]
"""A `PlanRecord` with the name of its component."""


def make_checkpoint(family: str, number: int, work: Path) -> Path:
    model = work / f"{family}-{number}"
    if not (model / "model_index.json").exists():
        script = Path(__file__).with_name("random_checkpoints.py")
        subprocess.run([sys.executable, script, family, model, "--seed", str(number * 10)], check=True)
    return model


def convert_words(model: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "sdopt", "convert", str(model), "-o", str(output), "--target", _TARGET, "--no-verify"
    ]  # fmt: skip


def measure_family(family: str, work: Path) -> tuple[list[Row], list[PlanTable]]:
    """The rows, and what each plan's record says of the build of all of them."""
    models = [make_checkpoint(family, number, work) for number in (0, 1)]
    cache, bundle = work / f"plan-cache-{family}", work / f"plan-bundle-{family}"
    this, limits = [sys.executable, str(Path(__file__).resolve())], _UNET_BUDGETS[family]

    def measure_case(
        case: str, words: list[str], limit_s: float | None = None, limit_gb: float | None = None
    ) -> tuple[Row, list[PlanTable]]:
        drop_plans(cache, bundle)
        noted = cache / _NOTED_NAME
        noted.unlink(missing_ok=True)
        os.sync()  # what was written and removed until now must not reach the disk on this row's clock
        seconds, peak_gb = measure(words, cache)
        table = json.loads(noted.read_bytes()) if noted.exists() else {"seconds": seconds, "plans": []}
        return show(Row(f"{family}: {case}", table["seconds"], peak_gb, limit_s, limit_gb)), table["plans"]

    remove(cache, bundle)  # a killed run leaves them
    try:
        measure(convert_words(models[0], bundle), cache)
        names = len(read_manifest(bundle).components)
        unet, _ = measure_case("UNet plan from ONNX", [*this, "--unet-of", str(bundle)], *limits)
        every, plans = measure_case(
            f"all {names} plans from ONNX", [*this, "--plans-of", str(bundle)], *_BUDGETS[family]
        )
        remove(bundle)
        second, _ = measure_case("second checkpoint, whole convert", convert_words(models[1], bundle))
        again, _ = measure_case("UNet plan again", [*this, "--unet-of", str(bundle)], *limits)
    finally:
        remove(cache, bundle)
    return [unet, every, second, again], plans


def drop_plans(cache: Path, bundle: Path) -> None:
    """Remove every plan from the store, where the next build would find it, and from the bundle, which holds it too."""
    remove(cache / "store" / STAGE)
    for plan in bundle.glob("*/*.plan"):
        plan.unlink()


def remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def note_stage(seconds: float, plans: Sequence[PlanTable] = ()) -> None:
    """Leave what a stage took and made to the process that started this one."""
    table = {"seconds": round(seconds, 1), "plans": list(plans)}
    (Path(os.environ["SDOPT_CACHE"]) / _NOTED_NAME).write_text(json.dumps(table), encoding="utf-8")


def show(row: Row) -> Row:
    verdict = "within" if row.within else "OVER"
    limit = "" if row.limit_s is None else f"  [{row.limit_s} s and {row.limit_gb} GB] {verdict}"
    print(f"{row.case}: {row.seconds:.1f} s, {row.peak_gb:.2f} GB{limit}", file=sys.stderr, flush=True)
    return row


def build_plans_of(bundle: Path) -> None:
    """The plan stage of `sdopt convert` on the graphs and weights of a bundle."""
    manifest = read_manifest(bundle)
    plan = open_plan(manifest.recipe)
    audits = {name: record.audit for name, record in manifest.components.items()}
    weights = {name: manifest.files[f"{name}/weights.safetensors"] for name in manifest.components}
    cache = Path(os.environ["SDOPT_CACHE"])
    started = time.monotonic()
    made = make_plans(plan, Store(cache), cache, bundle, audits, weights)
    seconds = time.monotonic() - started
    records = [(each.component, record) for each in made for record in each.records]
    note_stage(seconds, [{"component": name, **record.model_dump(mode="json")} for name, record in records])


def build_unet_of(bundle: Path) -> None:
    record = read_manifest(bundle).components[ComponentName.UNET]
    folder, output = bundle / ComponentName.UNET, Path(os.environ["SDOPT_CACHE"]) / "unet.plan"
    job = PlanJob(
        kind="tensorrt-rtx", component=ComponentName.UNET, precision=record.precision, graph=folder / "model.onnx",
        weights=folder / "weights.safetensors", output=output, generation="sm89", profiles=(),
        attention_layers=record.audit.attention_layers, native=True, require_fused=True, rung=Rung("alone"),
        memory_limit_bytes=None, timing_cache=None,
    )  # fmt: skip
    started = time.monotonic()
    call_by_name(
        "sdopt.convert.plans.build:build_in_child", JOB.dump_python(job, mode="json"), environment=MALLOC_ENVIRONMENT
    )
    note_stage(time.monotonic() - started)
    output.unlink()


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(["sd15", "sdxl"]))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/budget"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write rows, audits and machine.")
@click.option("--plans-of", type=click.Path(path_type=Path), hidden=True)
@click.option("--unet-of", type=click.Path(path_type=Path), hidden=True)
def main(
    families: tuple[str, ...], work: Path, json_path: Path | None, plans_of: Path | None, unet_of: Path | None
) -> None:
    if plans_of is not None:
        return build_plans_of(plans_of)
    if unet_of is not None:
        return build_unet_of(unet_of)
    work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    measured = [measure_family(family, work) for family in families]
    if json_path is not None:
        table = {
            "load_before": load,
            "machine": describe_machine().model_dump(mode="json"),
            "rows": [{**asdict(row), "within": row.within} for rows, _ in measured for row in rows],
            "plans": [plan for _, plans in measured for plan in plans],
        }
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
