"""What the shipped adapters do to the pictures of tiny-shapes, in figures, on one engine with slots.

    sdopt convert sdopt/assets/tiny-shapes --target onnxruntime --precision fp32 --lora-slots all:16 -o out/slotted
    python -m benchmarks.adapter_figures out/slotted --json benchmarks/reports/adapters.json

`filled` is the share of a shape's inside that is filled, `palette` the mean distance of the pixels from white and blue
in RGB, both over five large shapes; `right` the share of prompts of which everything is drawn.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np

import sdopt
from scripts.tiny_shapes_check import (
    Scene,
    count_right,
    judge_image,
    measure_filling,
    measure_palette_distance,
    sample_scenes,
    write_prompt,
)
from sdopt.machine.environment import describe_machine

_ADAPTERS = Path("sdopt/assets/tiny-adapters")
_PALETTE = ("white", "blue")
_SCENES = (
    Scene("circle", "red", "yellow", "large", "left"),
    Scene("square", "green", "black", "large", "right"),
    Scene("triangle", "purple", "white", "large", "bottom"),
    Scene("circle", "orange", "green", "large", "centre"),
    Scene("star", "red", "yellow", "large", "top"),
)
_PLACES = ("left", "right", "top", "bottom", "centre")


class Figures:
    def __init__(self, bundle: Path) -> None:
        self.pipe = sdopt.load(bundle)
        self.pipe.set_progress_bar_config(disable=True)

    def draw(self, prompt: str, seed: int = 3, **fields: Any) -> np.ndarray[Any, Any]:
        request = {"prompt": prompt, "steps": 10, "seed": seed, "guidance_scale": 4.0, **fields}
        return np.array(sdopt.draw(self.pipe, request, lora_folders=[_ADAPTERS]))

    def measure_blend(self, tags: str, *, recoloured: bool = False) -> dict[str, float]:
        pictures = [self.draw(f"{write_prompt(scene)}{tags}") for scene in _SCENES]
        shown = [replace(each, colour="white", ground="blue") if recoloured else each for each in _SCENES]
        return {
            "filled": mean(measure_filling(*each) for each in zip(pictures, shown, strict=True)),
            "palette": mean(measure_palette_distance(pixels, _PALETTE) for pixels in pictures),
        }

    def count(self, prompts: list[str], scenes: list[Scene], **fields: Any) -> float:
        pictures = [self.draw(prompt, seed, **fields) for seed, prompt in enumerate(prompts)]
        verdicts = [judge_image(*each) for each in zip(pictures, scenes, strict=True)]
        return count_right(verdicts)["everything"]

    def measure(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            name: {weight: self.measure_blend(f"<lora:{name}:{weight}>") for weight in (0, 0.5, 1)}
            for name in ("outlines", "palette")
        }
        result["both"] = self.measure_blend("<lora:outlines:1><lora:palette:1>", recoloured=True)
        scenes = sample_scenes(20, 9)
        result["few-steps"] = {
            weight: self.count(
                [f"{write_prompt(scene)}<lora:few-steps:{weight}>" for scene in scenes], scenes, steps=2,
                guidance_scale=1.0,
            )
            for weight in (0, 1)
        }  # fmt: skip
        moons = [Scene("circle", "white", "black", "large", place) for place in _PLACES for _ in range(2)]
        prompts = [f"a large moon, {scene.place}" for scene in moons]
        words = {0: [], 1: [{"source": str(_ADAPTERS / "moon.safetensors")}]}
        result["moon"] = {known: self.count(prompts, moons, embeddings=each) for known, each in words.items()}
        return result


@click.command(help=(__doc__ or "").split("\n", 1)[0])
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures and the machine.")
def main(bundle: Path, json_path: Path | None) -> None:
    result = Figures(bundle).measure()
    click.echo(json.dumps(result, indent=1))
    if json_path is not None:
        report = {**result, "machine": describe_machine().model_dump(mode="json")}
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
