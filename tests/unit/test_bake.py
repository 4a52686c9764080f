"""Adapters that are added to the weights: the sum in fp32, rounded once, in every tensor that they change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdopt.adapters.bake import Baked, bake
from sdopt.checkpoint.checkpoint import Choice
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.decide import open_plan
from sdopt.disk.store import Store
from sdopt.errors import AdapterError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraChoice, parse_lora
from sdopt.model.recipe import BuildRecipe
from sdopt.weights.to_torch import read_tensor
from tests.conftest import TINY_SHAPES
from tests.slotted_bundle import write_lora

UNET, TEXT = ComponentName.UNET, ComponentName.TEXT_ENCODER


def run(tmp_path: Path, *loras: LoraChoice) -> Baked:
    checkpoint = open_checkpoint(str(TINY_SHAPES), Choice(offline=True))
    return bake({n: p.tensors for n, p in checkpoint.components.items()}, loras, Store(tmp_path / "cache"))


def expect(file: Path, layer: str, weight: Tensor, strength: float, prefix: str) -> Tensor:
    """By hand: fp32 W + strength x up @ down."""
    tensors = load_file(file)
    down, up = tensors[f"{prefix}.{layer}.lora_A.weight"], tensors[f"{prefix}.{layer}.lora_B.weight"]
    return weight.float() + strength * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


@pytest.fixture
def files(pristine_bundle: Path, tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / f"{seed}.safetensors", pristine_bundle, seed, rank=seed + 1) for seed in (1, 2)]


def test_every_changed_tensor_is_the_rounded_sum(files: list[Path], tmp_path: Path) -> None:
    before = run(tmp_path).components
    baked = run(tmp_path, LoraChoice(str(files[0]), 0.8, 0.3), LoraChoice(str(files[1]), -0.5, -0.5))
    changed = 0
    for component, prefix, strengths in (
        (UNET, "unet", (0.8, -0.5)), (TEXT, "text_encoder.text_model", (0.3, -0.5)),
    ):  # fmt: skip
        for name, ref in before[component].items():
            now = baked.components[component][name]
            if f"{prefix}.{name.removesuffix('.weight')}.lora_A.weight" not in load_file(files[0]):
                assert now == ref
                continue
            changed += 1
            total = read_tensor(ref).float()
            for file, strength in zip(files, strengths, strict=True):
                total = expect(file, name.removesuffix(".weight"), total, strength, prefix)
            assert now.dtype is ref.dtype
            assert (read_tensor(now).float() - total).norm() <= 2**-10 * total.norm()
            assert not torch.equal(read_tensor(now), read_tensor(ref))
    assert changed == sum(name.endswith("lora_A.weight") for name in load_file(files[0]))
    assert [(each.name, each.unet, each.text) for each in baked.adapters] == [("1", 0.8, 0.3), ("2", -0.5, -0.5)]


def test_one_sum_is_rounded_once(pristine_bundle: Path, tmp_path: Path) -> None:
    """Twice half an adapter is that adapter, bit for bit: nothing was rounded between the two."""
    file = write_lora(tmp_path / "a.safetensors", pristine_bundle, 3, strength=1e-3)
    once = run(tmp_path, LoraChoice(str(file))).components[UNET]
    halves = run(tmp_path, *[LoraChoice(str(file), 0.5, 0.5)] * 2).components[UNET]
    equal = [torch.equal(read_tensor(once[name]), read_tensor(halves[name])) for name in once]
    assert all(equal)


def test_a_store_that_was_emptied_makes_the_same_file_again(files: list[Path], tmp_path: Path) -> None:
    recipe = BuildRecipe(source=str(TINY_SHAPES), lora=(f"{files[0]}:0.8",))
    patch = pytest.MonkeyPatch()
    patch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    first = open_plan(recipe)
    shutil.rmtree(tmp_path / "cache")
    second = open_plan(recipe)
    patch.undo()
    assert first.components[UNET].weights_key == second.components[UNET].weights_key
    plain = open_plan(BuildRecipe(source=str(TINY_SHAPES)))
    assert plain.components[UNET].weights_key != first.components[UNET].weights_key
    assert plain.components[ComponentName.VAE_DECODER].weights_key == (
        first.components[ComponentName.VAE_DECODER].weights_key
    )
    assert first.recipe.lora == (f"{files[0]}:0.8",)
    assert len(first.checkpoint.source.adapters[0].sha256) == 64


def test_a_sum_that_the_type_cannot_hold_is_refused(pristine_bundle: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "large.safetensors", pristine_bundle, 3, strength=3e4)
    with pytest.raises(AdapterError, match="too large"):
        run(tmp_path, LoraChoice(str(file), 100.0, 100.0))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_not_an_adapter_of_this_model_is_refused(tmp_path: Path) -> None:
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 4), "unet.nowhere.lora_B.weight": torch.zeros(4, 2)},
              tmp_path / "other.safetensors")  # fmt: skip
    with pytest.raises(AdapterError):
        run(tmp_path, LoraChoice(str(tmp_path / "other.safetensors")))
    with pytest.raises(AdapterError):
        run(tmp_path, LoraChoice(str(tmp_path / "missing.safetensors")))


@pytest.mark.parametrize(
    ("text", "source", "unet", "encoder"),
    [
        ("ink.safetensors", "ink.safetensors", 1.0, 1.0), ("ink.safetensors:0.8", "ink.safetensors", 0.8, 0.8),
        ("ink:-0.3:0", "ink", -0.3, 0.0), ("C:/loras/ink.safetensors:0.5", "C:/loras/ink.safetensors", 0.5, 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0, 1.0), ("2:1:0.5:0.25", "2:1", 0.5, 0.25),
    ],
)  # fmt: skip
def test_a_lora_is_named_with_its_weights(text: str, source: str, unet: float, encoder: float) -> None:
    choice = parse_lora(text)
    assert (choice.source, choice.unet, choice.text) == (source, unet, encoder)
    assert parse_lora(str(choice)) == choice


@pytest.mark.parametrize("text", ["", ":0.8", "ink:nan", "ink:inf", "ink:101", "ink:0.5:-1e9", "  :1"])
def test_a_lora_without_a_name_or_a_sane_weight_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_lora(text)
