"""What LoRA slots cost on a full-size network, and how long a swap takes, in one process with steps taken in turns.

    python benchmarks/random_checkpoints.py sd15 out/random/sd15
    sdopt convert out/random/sd15 --lora-slots 128 --no-verify -o out/sd15-slots
    python benchmarks/lora_slots.py out/sd15-slots --json benchmarks/reports/lora-slots-sd15.json

The adapters have seeded random weights in every layer with a slot. `tax` is a step with an adapter of rank 16 against a
step of the plain engine, in wall time and in the process's CPU time, which neighbours disturb less. `none active` is
the step of a session with slots and nothing in them, against the same engine opened by itself. A swap counts from
`set_adapters` to where the next step could begin; a new file from its path to there.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from safetensors.torch import save_file

from sdopt.backends.component_files import component_files
from sdopt.backends.open import open_session
from sdopt.backends.slotted_session import SlottedSession
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.model.slots import Slot
from sdopt.pipeline.lora_scales import LayerScales
from sdopt.pipeline.lora_stack import LoraStack
from sdopt.trace.seeded_inputs import make_inputs

UNET = ComponentName.UNET
_PAIRS = 4
_RESIDENT, _TOGETHER = 50, 5


def write_adapter(path: Path, slots: tuple[Slot, ...], rank: int, seed: int) -> Path:
    """A PEFT file in fp16 with weights in every layer, as strong as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for slot in slots:
        out_channels, *inputs = slot.shape
        down = torch.randn(rank, *inputs, generator=generator) / torch.tensor(inputs).prod().sqrt()
        up = torch.randn(out_channels, rank, *(1 for _ in inputs[1:]), generator=generator) * 0.1 / rank**0.5
        tensors |= {f"unet.{slot.layer}.lora_A.weight": down.half(), f"unet.{slot.layer}.lora_B.weight": up.half()}
    save_file(tensors, path)
    return path


@dataclass
class Steps:
    """Wall and CPU seconds of one candidate's steps."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def time(self, run: Callable[[], object]) -> None:
        cpu, wall = time.process_time(), time.monotonic()
        run()
        self.wall_s.append(time.monotonic() - wall)
        self.cpu_s.append(time.process_time() - cpu)


def compare(steps: Mapping[str, Steps], name: str, base: str) -> dict[str, float]:
    """Medians of the pairs' ratios, less 1: 0.04 is 4 % more."""
    pairs = zip(steps[name].wall_s, steps[base].wall_s, strict=True)
    cpus = zip(steps[name].cpu_s, steps[base].cpu_s, strict=True)
    return {
        "wall": statistics.median(a / b for a, b in pairs) - 1, "cpu": statistics.median(a / b for a, b in cpus) - 1,
    }  # fmt: skip


def private_bytes() -> int:
    """Of this process alone: pages of mapped files are the weight file's own."""
    return int(psutil.Process().memory_full_info().uss)


def seconds(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started


class Bench:
    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.manifest: BundleManifest = read_manifest(folder)
        self.files = component_files(folder, self.manifest, UNET)
        self.inputs = make_inputs(self.files.spec, self.files.config, self.files.extents)
        session = open_session(self.files, self.manifest.components[UNET].backend)
        assert isinstance(session, SlottedSession), "the bundle has no slots: build it with --lora-slots"
        self.session = session
        self.stack = LoraStack(folder, self.manifest, {UNET: session})

    def activate(self, weights: Mapping[str, float]) -> None:
        self.stack.activate({name: {UNET: LayerScales(weight)} for name, weight in weights.items()})

    def load(self, path: Path, name: str) -> None:
        self.stack.load(path, name, error_limit=0.02)

    def step(self) -> None:
        self.session.run(self.inputs)

    def run(self) -> dict[str, Any]:
        slots, session = self.session.slots, self.session
        result: dict[str, Any] = {"slots": f"{slots.layers}:{slots.rank}", "layers": len(slots.slots)}
        files = {
            rank: write_adapter(self.work / f"rank-{rank}.safetensors", slots.slots, rank, rank) for rank in (16, 64)
        }
        self.step()
        before = private_bytes()
        self.load(files[16], "a")
        result["open_with_slots_s"] = seconds(lambda: self.activate({"a": 1.0}))
        self.step()
        gc.collect()
        result["second_session_bytes"] = private_bytes() - before
        steps = {"plain": Steps(), "rank 16": Steps()}
        for pair in range(_PAIRS):
            order = ["plain", "rank 16"] if pair % 2 == 0 else ["rank 16", "plain"]
            for name in order:
                self.activate({} if name == "plain" else {"a": 1.0})
                steps[name].time(self.step)
                print(f"{name}: {steps[name].wall_s[-1]:.2f} s", file=sys.stderr, flush=True)
        result["tax"] = compare(steps, "rank 16", "plain")
        result["step_s"] = {name: statistics.median(each.wall_s) for name, each in steps.items()}
        result["none_active"] = self._none_active()
        result |= self._swaps(files)
        session.close()
        return result

    def _none_active(self) -> dict[str, Any]:
        """With nothing in the slots: the bytes of the plain engine, in its time."""
        self.activate({})
        inner = self.session._plain
        assert inner is not None
        steps = {"with slots": Steps(), "bare": Steps()}
        for pair in range(_PAIRS):
            runs = [("with slots", self.step), ("bare", lambda: inner.run(self.inputs))]
            for name, run in runs if pair % 2 == 0 else reversed(runs):
                steps[name].time(run)
        same = all(
            torch.equal(value, inner.run(self.inputs)[name]) for name, value in self.session.run(self.inputs).items()
        )
        return {**compare(steps, "with slots", "bare"), "same_bytes": same}

    def _swaps(self, files: Mapping[int, Path]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for rank, path in files.items():
            name = f"new {path.stat().st_size / 1e6:.0f} MB"

            def load(path: Path = path, name: str = name) -> None:
                self.load(path, name)
                self.activate({name: 1.0})

            result[f"{name}_s"] = seconds(load)
            self.stack.drop([name])
            del rank
        for number in range(_RESIDENT):
            if number in (2, _RESIDENT - 1):
                names = [f"r{index}" for index in range(number)]
                result[f"swap_with_{number}_s"] = self._swap_seconds([[name] for name in names[:2]])
                if number > _TOGETHER:
                    groups = [names[start :: number // _TOGETHER][:_TOGETHER] for start in (0, 1)]
                    result[f"swap_{_TOGETHER}_of_{number}_s"] = self._swap_seconds(groups)
            path = write_adapter(self.work / "resident.safetensors", self.session.slots.slots, 16, number)
            self.load(path, f"r{number}")
        return result

    def _swap_seconds(self, groups: list[list[str]]) -> float:
        times = []
        for _ in range(5):
            for group in groups:
                weights = dict.fromkeys(group, 0.7)
                times.append(seconds(functools.partial(self.activate, weights)))
        return statistics.median(times)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures and the machine.")
def main(folder: Path, json_path: Path | None) -> None:
    load_before = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        result = Bench(folder, Path(work)).run()
    report = {"bundle": folder.name, "load_before": load_before, **result,
              "machine": describe_machine().model_dump(mode="json")}  # fmt: skip
    print(json.dumps({key: value for key, value in report.items() if key != "machine"}, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
