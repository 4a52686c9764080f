"""A checkpoint whose UNet takes the guidance scale as an input: LCM's own, and not its LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdopt
from sdopt.model.request import TextToImage
from sdopt.tasks.draw import draw_picture
from tests.reference_session import TINY_SHAPES
from tests.sdopt_process import run_sdopt

WIDTH = 16


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-shapes with a projection of the guidance, of random weights that are large enough to see."""
    folder = tmp_path_factory.mktemp("lcm") / "model"
    shutil.copytree(TINY_SHAPES, folder)
    edit(folder / "unet" / "config.json", time_cond_proj_dim=WIDTH)
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    first = tensors["time_embedding.linear_1.weight"]
    noise = torch.randn(first.shape[1], WIDTH, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {"time_embedding.cond_proj.weight": noise.to(first.dtype)}, path, {"format": "pt"})
    return folder


def test_the_guidance_reaches_the_engine_in_one_row(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    run_sdopt("convert", str(model), "-o", str(output), "--target", "onnxruntime", cache=tmp_path / "cache")
    ours: Any = sdopt.load(output)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    rows: list[tuple[int, ...]] = []
    run = ours.unet.session.run

    def spy(inputs: dict[str, torch.Tensor]) -> Any:
        rows.append(tuple(inputs["timestep_cond"].shape))
        return run(inputs)

    ours.unet.session.run = spy
    drawn = []
    for scale in (1.0, 8.0):
        request = TextToImage(prompt="a large red circle", seed=3, steps=4, guidance_scale=scale)
        pictures = []
        for pipe in (ours, plain):
            pipe.set_progress_bar_config(disable=True)
            pictures.append(np.asarray(draw_picture(pipe, request)).astype(float))
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
        drawn.append(pictures[0])
    assert set(rows) == {(1, WIDTH)}
    assert np.abs(drawn[0] - drawn[1]).max() > 4
    again = run_sdopt("generate", str(output), "a circle", "-o", str(tmp_path / "picture.png"))
    assert "is LCM, and is drawn with --steps 4 --scale 8" in again.stderr
