"""What converting full-size networks costs: seconds and peak memory, against the budgets.

    python benchmarks/export_budget.py sd15 sdxl --work out/budget

Every row is the real command in a fresh process with an empty store. Memory is the sum of the resident memory of the
command and all its children, sampled every 50 ms: pages that two of them share count twice. The machine's other load
counts too; `copy` is the time of a plain copy of the weights in the same run, for scale.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from sdopt.machine.environment import describe_machine

_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Row:
    """`limit_s` and `limit_gb` are the budget; None where there is none."""

    case: str
    seconds: float
    peak_gb: float
    limit_s: float | None
    limit_gb: float | None

    @property
    def within(self) -> bool:
        return (self.limit_s is None or self.seconds <= self.limit_s) and (
            self.limit_gb is None or self.peak_gb <= self.limit_gb
        )


def measure(command: list[str], cache: Path) -> tuple[float, float]:
    """(seconds, peak GB of the process tree) of a command that must succeed."""
    started = time.monotonic()
    with subprocess.Popen(
        command, env={**os.environ, "SDOPT_CACHE": str(cache)}, stderr=subprocess.PIPE, text=True
    ) as process:
        tree, peak_bytes = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _resident_bytes(tree))
            time.sleep(_SAMPLE_S)
        seconds = time.monotonic() - started
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}\n{errors[-2000:]}")
    return seconds, peak_bytes / 1e9


def _resident_bytes(tree: psutil.Process) -> int:
    total = 0
    try:
        for process in [tree, *tree.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def measure_family(family: str, work: Path, *, parity: bool) -> list[Row]:
    """Every case of one family. The two checkpoints have one architecture and different weights."""
    models = [work / f"{family}-{seed}" for seed in (0, 1)]
    for seed, model in enumerate(models):
        if not (model / "model_index.json").exists():
            script = Path(__file__).with_name("random_checkpoints.py")
            subprocess.run([sys.executable, script, family, model, "--seed", str(seed * 10)], check=True)
    cache, out = work / f"cache-{family}", work / f"bundle-{family}"
    shutil.rmtree(cache, ignore_errors=True)
    export_s, export_gb, parity_s, parity_gb = (40, 1.2, 120, 6.5) if family == "sd15" else (150, 2.5, None, None)

    def convert(case: str, model: Path, limit_s: float | None, limit_gb: float | None, *extra: str) -> Row:
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "sdopt", "convert", str(model), "-o", str(out), *extra]
        row = Row(f"{family}: {case}", *measure(command, cache), limit_s, limit_gb)
        _print_row(row)
        return row

    rows = [convert("all components to ONNX, no parity", models[0], export_s, export_gb, "--no-verify")]
    copy = _time_copy(models[1], work)
    print(f"{family}: plain copy of the second checkpoint's weights: {copy:.1f} s", file=sys.stderr)
    rows.append(Row(f"{family}: plain copy of the weights", copy, 0.0, None, None))
    rows.append(convert("second checkpoint, no new trace", models[1], 2 * copy, None, "--no-verify"))
    if parity:
        shutil.rmtree(cache, ignore_errors=True)
        recipe = work / "parity.toml"
        recipe.write_text("[verify]\nfidelity = false\n", encoding="utf-8")
        rows.append(convert("the same with parity", models[0], parity_s, parity_gb, "--recipe", str(recipe)))
    shutil.rmtree(out, ignore_errors=True)
    return rows


def _time_copy(model: Path, work: Path) -> float:
    target = work / "copy"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = [path for path in model.rglob("*.safetensors")]
    started = time.monotonic()
    for number, path in enumerate(files):
        shutil.copyfile(path, target / str(number))
        with (target / str(number)).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _print_row(row: Row) -> None:
    limit = " and ".join(
        text for text, given in ((f"{row.limit_s} s", row.limit_s), (f"{row.limit_gb} GB", row.limit_gb)) if given
    )
    verdict = "" if not limit else ("within" if row.within else "OVER")
    print(f"{row.case}: {row.seconds:.1f} s, {row.peak_gb:.2f} GB  [{limit}] {verdict}", file=sys.stderr, flush=True)


@click.command()
@click.argument("families", nargs=-1, required=True, type=click.Choice(["sd15", "sdxl"]))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/budget"), show_default=True)
@click.option("--no-parity", is_flag=True, help="Leave out the row with parity.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows and the machine.")
def main(families: tuple[str, ...], work: Path, no_parity: bool, json_path: Path | None) -> None:
    work.mkdir(parents=True, exist_ok=True)
    rows = [row for family in families for row in measure_family(family, work, parity=not no_parity)]
    if json_path is not None:
        table = {
            "load_before": os.getloadavg()[2],
            "machine": describe_machine().model_dump(mode="json"),
            "rows": [{**asdict(row), "within": row.within} for row in rows],
        }
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
