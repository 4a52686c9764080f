"""Does optimum's ONNX Runtime pipeline load a bundle's folders, and draw the same picture?

    python benchmarks/optimum_check.py out/b --venv out/optimum-venv

optimum pins an old transformers, so it lives in an environment of its own, which this makes the first time. It is a
peer, never a dependency. Prints one JSON line: the mean difference of its picture from sdopt's, of 255.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

_REQUIREMENTS = ("optimum-onnx==0.1.0", "onnxruntime>=1.23", "diffusers<0.36", "torch>=2.10,<2.14", "accelerate")
_DRAW = """
import sys, torch
from diffusers import EulerDiscreteScheduler
from optimum.onnxruntime import ORTDiffusionPipeline
folder, prompt, steps, target = sys.argv[1:]
pipe = ORTDiffusionPipeline.from_pretrained(folder, provider="CPUExecutionProvider")
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
side = pipe.unet.config.sample_size
latents = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(1))
size = side * pipe.vae_scale_factor
image = pipe(prompt, num_inference_steps=int(steps), guidance_scale=4.0, latents=latents, height=size, width=size)
image.images[0].save(target)
"""


def make_environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *_REQUIREMENTS], check=True)
    return python


def draw_with_sdopt(folder: Path, prompt: str, steps: int) -> Image.Image:
    import torch
    from diffusers import EulerDiscreteScheduler

    import sdopt

    pipe = sdopt.load(folder)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    side = pipe.unet.config.sample_size
    latents = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(1))
    return pipe(prompt, num_inference_steps=steps, guidance_scale=4.0, latents=latents).images[0]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--venv", type=click.Path(path_type=Path), default=Path("out/optimum-venv"), show_default=True)
@click.option("--prompt", default="a large red circle on a blue background", show_default=True)
@click.option("--steps", default=20, show_default=True)
def main(folder: Path, venv: Path, prompt: str, steps: int) -> None:
    python = make_environment(venv)
    with tempfile.TemporaryDirectory() as work:
        picture = Path(work) / "optimum.png"
        subprocess.run([python, "-c", _DRAW, folder, prompt, str(steps), picture], check=True)
        with Image.open(picture) as image:
            theirs = np.asarray(image.convert("RGB"), float)
    ours = np.asarray(draw_with_sdopt(folder, prompt, steps).convert("RGB"), float)
    difference = float(np.abs(ours - theirs).mean())
    print(json.dumps({"folder": str(folder), "same_size": ours.shape == theirs.shape, "mean_difference": difference}))
    if difference > 8:
        raise click.ClickException("the pictures differ")


if __name__ == "__main__":
    main()
