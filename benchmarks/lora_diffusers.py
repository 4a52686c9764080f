"""The same swaps and the same tax with diffusers and peft, beside `lora_slots.py` on the same checkpoint and files.

    python benchmarks/random_checkpoints.py sd15 out/random/sd15
    python -m benchmarks.lora_diffusers out/random/sd15 out/sd15-slots --json benchmarks/reports/lora-diffusers.json
    python -m benchmarks.lora_diffusers out/random/sd15 out/sd15-slots --hotswap    # compiled, and hot-swapped

torch computes in fp32, or in bf16 where the processor has it. A swap counts to where the next step could begin.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from benchmarks.lora_slots import UNET, Steps, compare, seconds, write_adapter
from sdopt.bundle.manifest import read_manifest
from sdopt.machine.environment import describe_machine

_PAIRS = 3
_RANK, _SLOT_RANK = 16, 64


class Diffusers:
    """A pipeline of diffusers, of whose UNet one guided step is run."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from diffusers import StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype, safety_checker=None)
        generator = torch.Generator().manual_seed(0)
        width = self.pipe.unet.config.cross_attention_dim
        self.inputs = {
            "sample": torch.randn(2, 4, 64, 64, generator=generator).to(dtype), "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, width, generator=generator).to(dtype),
        }  # fmt: skip

    def step(self) -> None:
        with torch.inference_mode():
            self.pipe.unet(**self.inputs)

    def load(self, path: Path, name: str, *, hotswap: bool = False) -> None:
        self.pipe.load_lora_weights(path, adapter_name=name, hotswap=hotswap)
        if not hotswap:
            self.pipe.set_adapters([name], [1.0])

    def measure_eager(self, files: dict[int, Path], residents: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        self.step()
        self.load(files[_RANK], "a")
        steps = {"plain": Steps(), "rank 16": Steps()}
        for pair in range(_PAIRS):
            for name in ("plain", "rank 16") if pair % 2 == 0 else ("rank 16", "plain"):
                if name == "plain":
                    self.pipe.disable_lora()
                else:
                    self.pipe.enable_lora()
                steps[name].time(self.step)
                print(f"{name}: {steps[name].wall_s[-1]:.2f} s", file=sys.stderr, flush=True)
        result["tax"] = compare(steps, "rank 16", "plain")
        result["step_s"] = {name: statistics.median(each.wall_s) for name, each in steps.items()}
        self.pipe.delete_adapters("a")
        for path in files.values():
            result[f"new {path.stat().st_size / 1e6:.0f} MB_s"] = seconds(functools.partial(self.load, path, "new"))
            self.pipe.delete_adapters("new")
        for number in range(residents):
            self.load(files[_RANK], f"r{number}")
            if number + 1 in (2, residents):
                names = ["r0", "r1"] * 3
                times = [seconds(functools.partial(self.pipe.set_adapters, [name], [0.7])) for name in names]
                result[f"swap_with_{number + 1}_s"] = statistics.median(times)
                print(
                    f"{number + 1} resident: {result[f'swap_with_{number + 1}_s']:.3f} s", file=sys.stderr, flush=True
                )
        return result

    def measure_hotswap(self, files: dict[int, Path]) -> dict[str, Any]:
        """As its documentation has it: prepare for the largest rank, load, compile, and swap in place."""
        self.pipe.enable_lora_hotswap(target_rank=_SLOT_RANK)
        self.load(files[_RANK], "a")
        self.pipe.unet.compile(dynamic=False)
        result: dict[str, Any] = {"first_step_s": seconds(self.step)}
        result["step_s"] = statistics.median(seconds(self.step) for _ in range(_PAIRS))
        for path in files.values():
            swap = functools.partial(self.load, path, "a", hotswap=True)
            result[f"hot swap {path.stat().st_size / 1e6:.0f} MB_s"] = seconds(swap)
            result[f"step after {path.stat().st_size / 1e6:.0f} MB_s"] = seconds(self.step)
        return result


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--residents", default=49, show_default=True)
@click.option("--hotswap", is_flag=True, help="Compiled, and swapped in place, instead of eager.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures and the machine.")
def main(checkpoint: Path, bundle: Path, residents: int, hotswap: bool, json_path: Path | None) -> None:
    load_before, machine = psutil.getloadavg()[0], describe_machine()
    slots = read_manifest(bundle).components[UNET].slots
    assert slots is not None, "the bundle has no slots: build it with --lora-slots"
    dtype = torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(machine.cpu_features) else torch.float32
    with tempfile.TemporaryDirectory() as work:
        files = {
            rank: write_adapter(Path(work) / f"rank-{rank}.safetensors", slots.slots, rank, rank)
            for rank in (_RANK, _SLOT_RANK)
        }
        peer = Diffusers(checkpoint, dtype)
        result = peer.measure_hotswap(files) if hotswap else peer.measure_eager(files, residents)
    report = {"way": "compile and hot swap" if hotswap else "eager", "dtype": str(dtype), "load_before": load_before,
              **result, "machine": machine.model_dump(mode="json")}  # fmt: skip
    print(json.dumps({key: value for key, value in report.items() if key != "machine"}, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
