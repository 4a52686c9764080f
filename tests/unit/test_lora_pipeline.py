"""diffusers' LoRA methods on a pipeline of engines do what they do on diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sdopt
from sdopt.errors import AdapterError, UsageError
from sdopt.model.slots import SlotSet
from sdopt.pipeline.load import close_engines
from tests.conftest import TINY_SHAPES
from tests.opened_pipeline import opened_pipeline
from tests.slotted_bundle import add_slots_to, write_lora

torch.set_num_threads(1)
# peft says so of a second adapter, and of one that is deleted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter glow was active:UserWarning"),
]
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def folder(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("loras")
    write_lora(work / "ink.safetensors", pristine_bundle, 1)
    write_lora(work / "glow.safetensors", pristine_bundle, 2, rank=7)
    return add_slots_to(pristine_bundle, work / "bundle")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[Any]:
    with opened_pipeline(folder) as opened:
        yield opened


@pytest.fixture
def engines(pipe: Any) -> Iterator[Any]:
    yield pipe
    pipe.unload_lora_weights()


@pytest.fixture
def torch_pipe() -> Any:
    opened = diffusers.StableDiffusionPipeline.from_pretrained(TINY_SHAPES, safety_checker=None, dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


def draw(pipe: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    arguments = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **options}
    latents: Tensor = pipe(PROMPT, generator=generator, **arguments).images
    return latents


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def load_both(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="ink")
    pipe.load_lora_weights(folder.parent / "glow.safetensors", adapter_name="glow")


WAYS: dict[str, Callable[[Any], None]] = {
    "the last one loaded": lambda pipe: None,
    "one with a weight": lambda pipe: pipe.set_adapters("ink", 0.6),
    "both": lambda pipe: pipe.set_adapters(["ink", "glow"], [0.8, -0.3]),
    "blocks apart": lambda pipe: pipe.set_adapters(
        ["ink", "glow"], [{"unet": {"down": 0.3, "mid": 0.0, "up": {"block_1": [0.2, 1.4], "block_2": 0.7}}}, 0.5]
    ),
    "components apart": lambda pipe: pipe.set_adapters(["ink"], [{"text_encoder": 0.2, "unet": 0.9}]),
    "one deleted": lambda pipe: pipe.delete_adapters("glow"),
    "disabled": lambda pipe: pipe.disable_lora(),
    "disabled and enabled": lambda pipe: (pipe.disable_lora(), pipe.enable_lora()),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("way", WAYS)
def test_engines_draw_what_diffusers_draws(way: str, engines: Any, torch_pipe: Any, folder: Path) -> None:
    drawn = []
    for pipe in (engines, torch_pipe):
        load_both(pipe, folder)
        WAYS[way](pipe)
        drawn.append(draw(pipe))
    assert distance(*drawn) < 2e-5
    assert engines.get_active_adapters() == torch_pipe.get_active_adapters()
    assert engines.get_list_adapters() == torch_pipe.get_list_adapters()


def test_a_call_may_scale_what_is_active(engines: Any, torch_pipe: Any, folder: Path) -> None:
    drawn = []
    for pipe in (engines, torch_pipe):
        pipe.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="ink")
        drawn.append(draw(pipe, cross_attention_kwargs={"scale": 0.4}))
    assert distance(*drawn) < 2e-5
    assert distance(draw(engines), drawn[0]) > 0.01, "the scale of one call holds for the next"


def test_weights_may_change_between_two_steps(engines: Any, torch_pipe: Any, folder: Path) -> None:
    def later(pipe: Any, step: int, timestep: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.set_adapters("ink", 0.2 + 0.5 * step)
        return tensors

    drawn = []
    for pipe in (engines, torch_pipe):
        pipe.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="ink")
        drawn.append(draw(pipe, callback_on_step_end=later))
    assert distance(*drawn) < 2e-5


def test_swapping_leaves_no_trace(engines: Any, folder: Path) -> None:
    without = draw(engines)
    load_both(engines, folder)
    pictures = {}
    for name in ("ink", "glow", "ink", "glow"):
        engines.set_adapters(name)
        latents = draw(engines)
        assert torch.equal(pictures.setdefault(name, latents), latents)
    assert distance(pictures["ink"], pictures["glow"]) > 0.05
    engines.unload_lora_weights()
    assert torch.equal(draw(engines), without)


def test_tensors_and_hotswap_are_taken(engines: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    engines.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="a")
    expected = draw(engines)
    engines.load_lora_weights(folder.parent / "glow.safetensors", adapter_name="a", hotswap=True)
    assert not torch.equal(draw(engines), expected)
    engines.load_lora_weights(load_file(folder.parent / "ink.safetensors"), adapter_name="a", hotswap=True)
    assert torch.equal(draw(engines), expected)


def test_what_slots_do_not_take_is_refused_and_changes_nothing(
    engines: Any, pristine_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    engines.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="ink")
    before = draw(engines)
    large = write_lora(tmp_path / "large.safetensors", pristine_bundle, 5, rank=33)
    with pytest.raises(AdapterError, match="33"):
        engines.load_lora_weights(large)
    half = write_lora(tmp_path / "half.safetensors", pristine_bundle, 6, rank=30)
    engines.load_lora_weights(half, adapter_name="half")
    with pytest.raises(AdapterError, match="34"):
        engines.set_adapters(["ink", "half"])
    with pytest.raises(UsageError, match="nobody"):
        engines.set_adapters("nobody")
    with pytest.raises(UsageError, match="ink"):
        engines.load_lora_weights(folder.parent / "ink.safetensors", adapter_name="ink")
    with pytest.raises(UsageError, match="nan"):
        engines.set_adapters("ink", float("nan"))
    with pytest.raises(UsageError, match="unett"):
        engines.set_adapters("ink", [{"unett": 0.5}])
    with pytest.raises(UsageError, match="bake"):
        engines.fuse_lora()
    engines.set_adapters("ink")
    assert torch.equal(draw(engines), before)


def test_a_bundle_without_slots_says_how_to_get_them(pristine_bundle: Path, folder: Path) -> None:
    bare = sdopt.load(pristine_bundle)
    with pytest.raises(UsageError) as refused:
        bare.load_lora_weights(folder.parent / "ink.safetensors")
    close_engines(bare)
    assert "--lora-slots 64" in (refused.value.hint or "")


def test_layers_without_a_slot_are_named(pristine_bundle: Path, folder: Path, tmp_path: Path) -> None:
    attention = sdopt.load(add_slots_to(pristine_bundle, tmp_path / "attention", SlotSet.ATTENTION))
    with pytest.raises(AdapterError, match="slot") as refused:
        attention.load_lora_weights(folder.parent / "ink.safetensors")
    close_engines(attention)
    assert "--lora-slots" in (refused.value.hint or "")


def test_pipelines_over_the_same_engines_share_adapters(engines: Any, folder: Path) -> None:
    relative = diffusers.AutoPipelineForImage2Image.from_pipe(engines)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures = []
    for name in ("ink", "glow", "ink"):
        engines.load_lora_weights(folder.parent / f"{name}.safetensors", adapter_name="one", hotswap=True)
        pictures.append(draw(relative, image=image, strength=0.9))
    assert torch.equal(pictures[0], pictures[2])
    assert distance(pictures[0], pictures[1]) > 0.05
    with pytest.raises(UsageError):
        relative.load_lora_weights(folder.parent / "ink.safetensors")
