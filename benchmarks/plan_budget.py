"""What building TensorRT-RTX plans of full-size networks costs with no GPU: seconds, peak memory, and the budgets.

    python benchmarks/plan_budget.py sd15 sdxl --work out/budget --json benchmarks/reports/plans.json

The graphs and weights are there before the clock starts; every row is a fresh process with no plan in the store. The
seconds of the rows "from ONNX" are those of the stage that builds plans, without the start of Python and the opening
of the checkpoint before it. Memory is the sum of the resident memory of the process and all its children, sampled every
50 ms.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from export_budget import Row, measure

from sdopt.artifacts.machine import describe_machine
from sdopt.artifacts.manifest import read_manifest
from sdopt.artifacts.store import Store
from sdopt.build.open import open_plan
from sdopt.build.plans.child import JOB, PlanJob, Rung
from sdopt.build.plans.make import MALLOC_ENVIRONMENT, make_plans
from sdopt.isolation import run_isolated
from sdopt.model.component import ComponentName

_BUDGETS = {"sd15": (30.0, 5.7), "sdxl": (None, None)}
_UNET_BUDGETS = {"sd15": (None, None), "sdxl": (60.0, 16.0)}
_TARGET = "rtx:sm89"


def prepare(family: str, work: Path) -> tuple[list[Path], Path, Path]:
    """Two checkpoints of one architecture, and a bundle of the first with the cache that made it."""
    models = [work / f"{family}-{seed}" for seed in (0, 1)]
    for seed, model in enumerate(models):
        if not (model / "model_index.json").exists():
            script = Path(__file__).with_name("random_checkpoints.py")
            subprocess.run([sys.executable, script, family, model, "--seed", str(seed * 10)], check=True)
    cache, bundle = work / f"plan-cache-{family}", work / f"plan-bundle-{family}"
    if not bundle.exists():
        measure(convert_words(models[0], bundle), cache)
    return models, cache, bundle


def convert_words(model: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "sdopt", "convert", str(model), "-o", str(output), "--target", _TARGET, "--no-verify"
    ]  # fmt: skip


def measure_family(family: str, work: Path) -> tuple[list[Row], list[dict[str, object]]]:
    """The rows, and what each plan's own record says of the build of all of them."""
    models, cache, bundle = prepare(family, work)
    audits = [
        {"component": name, **plan.model_dump(mode="json")}
        for name, record in read_manifest(bundle).components.items()
        for plan in record.plans
    ]
    this = [sys.executable, str(Path(__file__).resolve())]
    names = len(read_manifest(bundle).components)
    cases = [
        ("UNet plan from ONNX", [*this, "--unet-of", str(bundle)], _UNET_BUDGETS[family]),
        (f"all {names} plans from ONNX", [*this, "--plans-of", str(bundle)], _BUDGETS[family]),
        ("second checkpoint, whole convert", convert_words(models[1], work / "second"), (None, None)),
    ]
    rows = [show(measure_case(f"{family}: {case}", words, cache, limits)) for case, words, limits in cases]
    shutil.rmtree(work / "second")
    return rows, audits


def measure_case(case: str, words: list[str], cache: Path, limits: tuple[float | None, float | None]) -> Row:
    # Held by the bundle's hard links, they would be found.
    shutil.rmtree(cache / "store" / "plan", ignore_errors=True)
    noted = cache / "stage-seconds"
    noted.unlink(missing_ok=True)
    seconds, peak_gb = measure(words, cache)
    return Row(case, float(noted.read_text()) if noted.exists() else seconds, peak_gb, *limits)


@contextmanager
def stage_noted() -> Iterator[None]:
    """Note how long the body takes, for the process that started this one."""
    started = time.monotonic()
    yield
    (Path(os.environ["SDOPT_CACHE"]) / "stage-seconds").write_text(f"{time.monotonic() - started:.1f}")


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
    with stage_noted():
        make_plans(plan, Store(cache), cache, bundle, audits, weights)


def build_unet_of(bundle: Path) -> None:
    record = read_manifest(bundle).components[ComponentName.UNET]
    folder = bundle / ComponentName.UNET
    job = PlanJob(
        kind="tensorrt-rtx", component=ComponentName.UNET, precision=record.precision, graph=folder / "model.onnx",
        weights=folder / "weights.safetensors", output=bundle.parent / "unet.plan", generation="sm89", profiles=(),
        attention_layers=record.audit.attention_layers, native=True, require_fused=True, rung=Rung("alone"),
        memory_limit_bytes=None, timing_cache=None,
    )  # fmt: skip
    with stage_noted():
        run_isolated(
            "sdopt.build.plans.child:build_in_child", JOB.dump_python(job, mode="json"), environment=MALLOC_ENVIRONMENT
        )
    (bundle.parent / "unet.plan").unlink()


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
            "plans": [audit for _, audits in measured for audit in audits],
        }
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
