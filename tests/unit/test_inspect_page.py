"""`sdopt inspect` for people: readable at 80 columns, with units, and commands that work."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sdopt.bundle.manifest import BundleKind, write_manifest
from sdopt.cli.inspect import inspect
from sdopt.cli.main import cli
from sdopt.model.family import Family
from tests.checkpoints import make_model, small_recipe, to_original, write_folder
from tests.reference_session import make_bundle


def show(monkeypatch: pytest.MonkeyPatch, source: Path, *flags: str) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(inspect, [str(source), *flags])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", make_model(small_recipe(Family.SD1)))


def test_a_checkpoint_is_a_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = show(monkeypatch, folder)
    assert result.stdout == ""
    page = result.stderr
    for words in ("Stable Diffusion 1 checkpoint", "the noise (epsilon)", "a diffusers folder", "What fits it"):
        assert words in " ".join(page.split())
    assert "{" not in page
    command = next(line for line in page.splitlines() if "sdopt convert" in line)
    words = shlex.split(command)
    assert words[:3] == ["sdopt", "convert", str(folder)]
    assert CliRunner().invoke(cli, [*words[1:], "--dry-run"]).exit_code == 0
    # A command is one line that can be copied; everything else keeps to the terminal.
    assert all(len(line) <= 80 for line in page.splitlines() if "sdopt convert" not in line and str(folder) not in line)


def test_sizes_and_counts_are_those_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(show(monkeypatch, folder, "--json").stdout)
    files = {"unet": ["unet"], "text_encoder": ["text_encoder"], "vae": ["vae_decoder", "vae_encoder"]}
    for part, names in files.items():
        (weights,) = (folder / part).glob("*.safetensors")
        size_bytes = sum(table["components"][name]["bytes"] for name in names)
        assert 0 < size_bytes <= weights.stat().st_size <= size_bytes + 100_000
    assert (table["latent_channels"], table["multiple_px"] % table["pixels_per_latent"]) == (4, 0)


def test_what_no_component_uses_and_what_is_missing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: t.contiguous() for name, t in to_original(make_model(small_recipe(Family.SD1))).items()}
    save_file(tensors | {"logit_scale": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, tmp_path / "m.safetensors")
    page = " ".join(show(monkeypatch, tmp_path / "m.safetensors").stderr.split())
    assert "1 of unused half of CLIP" in page
    assert "EMA copy of the UNet" in page
    assert "-o engines/m" in page


def test_a_bundle_says_its_kind_and_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_bundle(tmp_path / "tiny")
    write_manifest(made.folder, made.manifest)
    table = json.loads(show(monkeypatch, made.folder, "--json").stdout)
    assert (table["kind"], table["bundle_kind"]) == ("bundle", "pipeline")
    assert table["tasks"] == ["text_to_image", "image_to_image", "inpaint"]
    page = " ".join(show(monkeypatch, made.folder).stderr.split())
    for words in (
        "a bundle of Stable Diffusion 1 engines",
        "a whole pipeline",
        "text to image, image to image, inpain",
    ):
        assert words in page
    assert "sdopt generate" in page


def test_a_bundle_that_draws_nothing_is_not_offered_to_be_drawn_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bundle(tmp_path / "control")
    changes = {"kind": BundleKind.CONTROLNET, "tasks": (), "components": {}}
    write_manifest(made.folder, made.manifest.model_copy(update=changes))
    page = " ".join(show(monkeypatch, made.folder).stderr.split())
    for words in ("a ControlNet", "nothing by itself", "sdopt check"):
        assert words in page
    assert "sdopt generate" not in page
