"""Does the nightly job catch a real 5 %? Two nights of this commit, then a commit whose UNet steps sleep 5 % longer.

    python benchmarks/planted_slowdown.py --share 0.05 --json out/planted-slowdown.json

Works on a clone in a temporary folder, by the same scripts/nightly as every night, with this Python. The machine has to
be quiet: beside a neighbour a night is dirty, and its times are not judged. Exits with 0 where the nights end 0, 0, 3,
and the third for the step that was slowed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

_REPOSITORY = Path(__file__).resolve().parent.parent
_SESSION = "sdopt/backends/engine_session.py"
_CALL = "        return self._compute(inputs)\n"
_SLEEPY = """\
        import time

        started = time.perf_counter()
        outputs = self._compute(inputs)
        if self.spec.name == "unet":
            time.sleep({share} * (time.perf_counter() - started))
        return outputs
"""

SUITE = """
name = "small"
[method]
repeats = 5
picture_budget_s = 4.0
least_pictures = 4
most_pictures = 20
[[cases]]
name = "tiny"
source = "tiny-shapes"
against = []
steps = [10]
recipe = { target = "onnxruntime", precision = "fp32", verify = { enabled = false } }
"""
_Edits = Mapping[str, tuple[str, str]]


def commit_edit(clone: Path, edits: _Edits, message: str) -> None:
    """Replace one text in each file by another, and commit. Each text has to be there once."""
    for name, (old, new) in edits.items():
        text = (clone / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name} has {old!r} {text.count(old)} times")
        (clone / name).write_text(text.replace(old, new), encoding="utf-8")
    identity = ["-c", "user.name=planter", "-c", "user.email=planter@example.org"]
    subprocess.run(["git", "-C", str(clone), *identity, "commit", "--quiet", "-am", message], check=True)


def plant_sleep(clone: Path, share: float) -> None:
    """Commit that each step of an engine's UNet takes `share` longer: a sleep in its session's run."""
    commit_edit(clone, {_SESSION: (_CALL, _SLEEPY.format(share=share))}, f"plant {share:.0%}")


def run_night(clone: Path, history: Path, suite: str) -> dict[str, Any]:
    """One night; its exit code and what the gate found."""
    environment = {**os.environ, "SDOPT_PYTHON": sys.executable, "SDOPT_HISTORY": str(history), "SUITE": suite}
    done = subprocess.run([str(clone / "scripts" / "nightly")], env=environment, check=False)
    newest = max((history.parent / "runs").glob("*/gate.json"), default=None)
    gate = json.loads(newest.read_bytes()) if newest else {}
    wall_s = json.loads((newest.parent / "run.json").read_bytes())["wall_ns"] / 1e9 if newest else None
    said = {name: gate.get(name, []) for name in ("findings", "suspects", "notes")}
    return {"exit_code": done.returncode, "measuring_s": wall_s} | said


@click.command()
@click.option("--share", default=0.05, show_default=True, help="Of the UNet step, that is slept.")
@click.option("--suite", help="Of configs/suites, or a file.  [default: tiny-shapes, five processes a night]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write what each night said.")
def main(share: float, suite: str | None, json_path: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        clone, history = Path(folder) / "clone", Path(folder) / "perf" / "history.jsonl"
        subprocess.run(["git", "clone", "--quiet", str(_REPOSITORY), str(clone)], check=True)
        (Path(folder) / "small.toml").write_text(SUITE, encoding="utf-8")
        suite = suite or str(Path(folder) / "small.toml")
        nights = [run_night(clone, history, suite) for _ in range(2)]
        plant_sleep(clone, share)
        nights.append(run_night(clone, history, suite))
    codes = [night["exit_code"] for night in nights]
    slower = [f["series"]["metric"] for f in nights[-1]["findings"] if f["rule"] == "slower" and f["series"]]
    caught = codes == [0, 0, 3] and bool({"unet_step", "end_to_end"} & set(slower))
    print(f"planted {share:.0%} of the UNet step: {codes}, expected [0, 0, 3]; {'caught' if caught else 'missed'}")
    for finding in nights[-1]["findings"]:
        print(f"  {finding['sentence']}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"share": share, "suite": Path(suite).stem, "nights": nights}, indent=1) + "\n")
    sys.exit(0 if caught else 1)


if __name__ == "__main__":
    main()
