"""What few-step models are drawn with: by published names alone, never over what a user gave, and always told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdopt.bundle.manifest import read_manifest, write_manifest
from sdopt.bundle.records import BakedAdapter
from sdopt.model.few_steps import propose, propose_for_guidance_input
from sdopt.model.request import DrawRequest, parse_request
from sdopt.pictures.png import read_recipe
from sdopt.tasks.loras import LoraFinder
from sdopt.tasks.proposals import take_proposals
from tests.sdopt_process import run_sdopt


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "scale"),
    [
        ("lcm-lora-sdv1-5", "lcm", 4, 1.0),
        ("lcm_lora_sdxl", "lcm", 4, 1.0),
        ("LCM-LoRA SDXL", "lcm", 4, 1.0),
        ("TCD-SDXL-LoRA", "tcd", 4, 1.0),
        ("sd_xl_turbo_1.0_fp16", "euler_a_sgm_uniform", 1, 1.0),
        ("sdxl-turbo", "euler_a_sgm_uniform", 1, 1.0),
        ("sd_turbo", "euler_a_sgm_uniform", 1, 1.0),
        ("sdxl_lightning_4step", "euler_sgm_uniform", 4, 1.0),
        ("sdxl_lightning_8step_lora", "euler_sgm_uniform", 8, 1.0),
        ("Hyper-SD15-4steps-lora", "euler_sgm_uniform", 4, 1.0),
        ("Hyper-SD15-8steps-CFG-lora", "euler_sgm_uniform", 8, 5.0),
        ("Hyper-SDXL-12steps-CFG-lora", "euler_sgm_uniform", 12, 5.0),
        ("Hyper-SDXL-1step-lora", "tcd", 4, 1.0),
        ("dmd2_sdxl_4step_lora_fp16", "lcm", 4, 1.0),
    ],
)
def test_published_names(name: str, scheduler: str, steps: int, scale: float) -> None:
    proposal = propose(name)
    assert proposal is not None
    assert (proposal.scheduler, proposal.steps, proposal.guidance_scale) == (scheduler, steps, scale)
    assert proposal.source == name


@pytest.mark.parametrize(
    "name",
    ["", "ink", "turbocharger", "dreamshaperXL_turboV2", "juggernaut_lightning", "lightning-strikes", "hyperrealism",
     "hyper-detail", "falcm-lorax", "sdxl_lightning_1step_x0", "sd-turbofan"],
)  # fmt: skip
def test_other_names_say_nothing(name: str) -> None:
    assert propose(name) is None


def test_a_unet_with_guidance_as_an_input_keeps_guidance() -> None:
    proposal = propose_for_guidance_input("LCM_Dreamshaper_v7")
    assert (proposal.scheduler, proposal.steps, proposal.guidance_scale) == ("lcm", 4, 8.0)


def write_lora(folder: Path, name: str, **metadata: str) -> Path:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(2, 8), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata)
    return path


def rename(bundle: Path, **changes: Any) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update=changes))


def drawn_with(request: DrawRequest) -> tuple[str | None, int, float]:
    return request.scheduler, request.steps, request.guidance_scale


def take(bundle: Path, folder: Path | None = None, **values: Any) -> tuple[DrawRequest, str]:
    request = parse_request({"prompt": "a circle", **values})
    (taken,) = take_proposals(bundle, [request], LoraFinder([folder] if folder else []), {"steps": "--steps"})
    return taken.request, taken.told


def test_a_model_without_a_known_name_is_drawn_as_ever(pristine_bundle: Path) -> None:
    request, told = take(pristine_bundle)
    assert drawn_with(request) == (None, 20, 7.5)
    assert told == ""


def test_a_lora_proposes_by_its_file_its_title_or_its_output_name(pristine_bundle: Path, tmp_path: Path) -> None:
    write_lora(tmp_path, "lcm-lora-sdv1-5")
    write_lora(tmp_path, "mine", **{"modelspec.title": "Hyper-SD15-8steps-CFG-lora"})
    request, told = take(pristine_bundle, tmp_path, prompt="a circle <lora:lcm-lora-sdv1-5:1>")
    assert drawn_with(request) == ("lcm", 4, 1.0)
    assert told == "lcm-lora-sdv1-5 is LCM, and is drawn with scheduler lcm --steps 4 guidance_scale 1"
    request, told = take(pristine_bundle, tmp_path, loras=[{"source": "mine"}])
    assert drawn_with(request) == ("euler_sgm_uniform", 8, 5.0)
    assert str(tmp_path) not in told
    # One that does not act on the UNet does not make it a model of few steps.
    assert take(pristine_bundle, tmp_path, loras=[{"source": "mine", "unet": 0.0}])[1] == ""


def test_what_is_given_stays_also_where_it_is_the_default(pristine_bundle: Path, tmp_path: Path) -> None:
    """Planted: a proposal that looked at values, and not at what was given, would take 20 steps for none."""
    write_lora(tmp_path, "lcm-lora-sdv1-5")
    prompt = "a circle <lora:lcm-lora-sdv1-5:1>"
    request, told = take(pristine_bundle, tmp_path, prompt=prompt, steps=20)
    assert drawn_with(request) == ("lcm", 20, 1.0)
    assert "steps" not in told
    request, told = take(pristine_bundle, tmp_path, prompt=prompt, steps=20, guidance_scale=7.5, scheduler="ddim")
    assert drawn_with(request) == ("ddim", 20, 7.5)
    assert told == ""


def test_what_is_in_the_weights_and_what_the_unet_takes_propose_too(bundle: Path) -> None:
    source = read_manifest(bundle).source
    baked = BakedAdapter(name="TCD-SD15-LoRA", sha256="0" * 64, unet=1.0, text=1.0)
    rename(bundle, source=source.model_copy(update={"adapters": (baked,)}))
    assert drawn_with(take(bundle)[0]) == ("tcd", 4, 1.0)
    rename(bundle, source=source.model_copy(update={"location": "/models/sd_turbo.safetensors", "kind": "single-file"}))
    assert drawn_with(take(bundle)[0]) == ("euler_a_sgm_uniform", 1, 1.0)
    rename(bundle, source=source)
    config = bundle / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 256}))
    assert drawn_with(take(bundle)[0]) == ("lcm", 4, 8.0)


def test_the_makers_own_scheduler_is_kept_where_it_is_the_one(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LCMScheduler

    from sdopt.pipeline import assemble

    write_lora(tmp_path, "lcm-lora-sdv1-5")
    monkeypatch.setattr(assemble, "read_scheduler", lambda folder, name: LCMScheduler())
    request, told = take(pristine_bundle, tmp_path, prompt="a circle <lora:lcm-lora-sdv1-5:1>")
    assert drawn_with(request) == (None, 4, 1.0)
    assert "scheduler" not in told


def test_the_command_says_it_in_a_line_and_the_picture_keeps_it(bundle: Path, tmp_path: Path) -> None:
    rename(bundle, name="sd-turbo")
    run = run_sdopt("generate", str(bundle), "a circle", "a star", "--seed", "3", "-o", str(tmp_path / "out"))
    line = "sd-turbo is Turbo, and is drawn with --scheduler euler_a_sgm_uniform --steps 1 --scale 1"
    assert run.stderr.splitlines().count(line) == 1
    pictures = sorted((tmp_path / "out").glob("0*.png"))
    for path in pictures[:2]:
        recipe = read_recipe(path)
        assert recipe.proposed == line
        assert drawn_with(recipe.request) == ("euler_a_sgm_uniform", 1, 1.0)
    again = run_sdopt("generate", str(bundle), "--from-image", str(pictures[0]), "-o", str(tmp_path / "again.png"))
    assert line not in again.stderr
    assert read_recipe(tmp_path / "again.png").request == read_recipe(pictures[0]).request
    shutil.rmtree(tmp_path / "out")
