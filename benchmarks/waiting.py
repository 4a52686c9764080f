"""How long the commands of this tree keep somebody waiting, beside those of another commit.

    python benchmarks/waiting.py --base 2f433bc --rounds 3 --json benchmarks/reports/waiting.json
    python benchmarks/waiting.py --base 2f433bc --case sd15 --rounds 1

Both trees run the same commands in turns (A B, B A, …), each in a process of its own, with a store of its own and the
same environment; a row is the ratio of the medians. Memory is the proportional set size (PSS) of the command and its
children at its peak, sampled every 200 ms: pages that processes share count once. The machine's other load counts;
`--help` is there for scale. `finished` is a convert that finds its bundle done, `sd15` a full-size SD1.5 with random
weights, with parity and without pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from sdopt.machine.environment import describe_machine
from sdopt.perf.night.worktree import checked_out

_REPOSITORY = Path(__file__).resolve().parent.parent
_TINY = _REPOSITORY / "sdopt" / "assets" / "tiny-shapes"
# A sample holds the processes up for some milliseconds each.
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Side:
    """A tree of code and the folder in which its commands leave their store and bundles."""

    tree: Path
    work: Path

    def run(self, *words: str) -> tuple[float, float]:
        """(seconds, peak PSS of the process tree in GB) of `sdopt` with these words, which must succeed."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "SDOPT_CACHE": str(self.work / "cache")}
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", "sdopt", *words], env=environment, cwd=self.tree, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            peak_bytes = 0
            while process.poll() is None:
                peak_bytes = max(peak_bytes, _measure_pss(process.pid))
                time.sleep(_SAMPLE_S)
            seconds = time.monotonic() - started
            errors = process.stderr.read() if process.stderr else ""
        if process.returncode:
            raise click.ClickException(f"sdopt {' '.join(words)} ended with {process.returncode}\n{errors[-2000:]}")
        return seconds, peak_bytes / 1e9

    @property
    def bundle(self) -> str:
        return str(self.work / "bundle")

    def clear(self, *, store: bool) -> None:
        shutil.rmtree(self.bundle, ignore_errors=True)
        if store:
            shutil.rmtree(self.work / "cache", ignore_errors=True)


@dataclass(frozen=True)
class Row:
    """Medians of this tree and of the base; `limit` is the ratio or the seconds asked for, whichever `unit` says."""

    case: str
    seconds: float
    base_seconds: float
    peak_gb: float
    base_peak_gb: float
    limit: float | None
    unit: str
    samples_s: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def ratio(self) -> float:
        return self.seconds / self.base_seconds


def _measure_pss(pid: int) -> int:
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text("ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    except (psutil.NoSuchProcess, OSError):
        pass
    return total


def _convert(*options: str, source: Path = _TINY) -> Callable[[Side], tuple[float, float]]:
    def run(side: Side) -> tuple[float, float]:
        side.clear(store=True)
        return side.run("convert", str(source), "-o", side.bundle, *options)

    return run


def _find_finished(side: Side) -> tuple[float, float]:
    return side.run("convert", str(_TINY), "-o", side.bundle)


# What `finished` finds is what `convert` made in the same round.
_CASES: dict[str, tuple[Callable[[Side], tuple[float, float]], float | None, str]] = {
    "help": (lambda side: side.run("--help"), None, "x"),
    "int8": (_convert("--precision", "int8"), 0.40, "x"),
    "convert": (_convert(), 0.40, "x"),
    "finished": (_find_finished, 2.0, "s"),
    "dry-run": (lambda side: side.run("convert", str(_TINY), "-o", f"{side.bundle}-2", "--dry-run"), 2.0, "s"),
    "inspect": (lambda side: side.run("inspect", str(_TINY)), 2.0, "s"),
}


def measure_case(name: str, sides: tuple[Side, Side], rounds: int, work: Path) -> Row:
    """Run a case on both sides in turns; the first side is this tree."""
    run, limit, unit = _CASES[name] if name in _CASES else (_sd15(work), 0.90, "x")
    samples: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            samples[index].append(run(sides[index]))
    (seconds, peak), (base_seconds, base_peak) = (
        (statistics.median(s for s, _ in side), max(gb for _, gb in side)) for side in samples
    )
    times = tuple(tuple(round(s, 2) for s, _ in side) for side in samples)
    return Row(name, seconds, base_seconds, peak, base_peak, limit, unit, (times[0], times[1]))


def _sd15(work: Path) -> Callable[[Side], tuple[float, float]]:
    model, recipe = work / "sd15-checkpoint", work / "parity.toml"
    if not (model / "model_index.json").exists():
        script = Path(__file__).with_name("random_checkpoints.py")
        subprocess.run([sys.executable, script, "sd15", model], check=True)
    recipe.write_text("[verify]\nfidelity = false\n", encoding="utf-8")
    return _convert("--recipe", str(recipe), source=model)


def format_row(row: Row) -> str:
    measured = row.ratio if row.unit == "x" else row.seconds
    verdict = "" if row.limit is None else f"  {'within' if measured <= row.limit else 'OVER'} {row.limit:g} {row.unit}"
    return (
        f"{row.case:10}{row.seconds:8.2f} s{row.base_seconds:8.2f} s before  {row.ratio:5.2f}x"
        f"{row.peak_gb:7.2f} GB{row.base_peak_gb:7.2f} GB before{verdict}"
    )


@click.command()
@click.option("--base", required=True, metavar="COMMIT", help="The commit to compare with.")
@click.option("--case", "names", multiple=True, type=click.Choice([*_CASES, "sd15"]), help="[default: all but sd15]")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/waiting"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows and the machine.")
def main(base: str, names: tuple[str, ...], rounds: int, work: Path, json_path: Path | None) -> None:
    work = work.resolve()
    load, rows = os.getloadavg()[0], []
    with checked_out(_REPOSITORY, base) as old:
        sides = (Side(_REPOSITORY, work / "here"), Side(old.root, work / "base"))
        for side in sides:
            side.work.mkdir(parents=True, exist_ok=True)
        for name in names or _CASES:
            rows.append(measure_case(name, sides, rounds, work))
            print(format_row(rows[-1]), flush=True)
    if json_path is not None:
        table = {
            "base": old.commit, "load_before": load, "machine": describe_machine().model_dump(mode="json"),
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }  # fmt: skip
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
