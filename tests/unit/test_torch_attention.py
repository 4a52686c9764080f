"""Which kernel computes torch's attention: that it is the one asked for, and that the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sdopt.backends import torch_attention
from sdopt.backends.torch_attention import dispatch_attention, prefer_kernel, use_package
from sdopt.bundle.manifest import read_config
from sdopt.errors import BackendError, MissingDependency
from sdopt.model.component import ComponentName
from sdopt.networks.modules import build_network
from tests.reference_session import TINY_SHAPES

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class Operations(TorchDispatchMode):
    """Names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def attend(attention: str, head: int = 16) -> tuple[torch.Tensor, set[str]]:
    query, key, value = torch.randn((3, 1, 2, 9, head), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Operations() as operations, prefer_kernel(attention):
        return scaled_dot_product_attention(query, key, value), operations.names


def test_each_kernel_is_the_one_that_runs() -> None:
    math, math_operations = attend("math")
    flash, flash_operations = attend("flash")
    assert FLASH in flash_operations
    assert FLASH not in math_operations
    torch.testing.assert_close(math, flash)


def test_a_kernel_that_does_not_fit_gives_way() -> None:
    """Neither is for a CPU: what is left computes it, without a warning."""
    expected, _ = attend("math")
    for attention in ("efficient", "cudnn"):
        torch.testing.assert_close(attend(attention)[0], expected)
    wide, _ = attend("flash", head=512)
    torch.testing.assert_close(wide, attend("math", head=512)[0])


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_pretrained(TINY_SHAPES / "unet", variant=None).eval()


def run(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn((2, 4, 16, 16), generator=generator)
    states = torch.randn((2, 77, unet.config.cross_attention_dim), generator=generator)
    with torch.inference_mode():
        return unet(sample, 500, states).sample


def test_diffusers_dispatcher_gives_the_same_numbers(unet: UNet2DConditionModel, monkeypatch: Any) -> None:
    from diffusers.models import attention_dispatch

    expected = run(unet)
    layers = sum(type(part).__name__ == "Attention" for part in unet.modules())
    assert dispatch_attention(unet, "native", 256) == layers > 0
    torch.testing.assert_close(run(unet), expected)

    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("the dispatcher was asked")

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", fail)
    with pytest.raises(ArithmeticError):
        run(unet)


def test_wide_heads_stay_with_torch(unet: UNet2DConditionModel) -> None:
    expected = run(unet)
    assert dispatch_attention(unet, "_native_math", 1) == 0
    assert torch.equal(run(unet), expected)


def test_a_package_that_is_not_there_is_named(unet: UNet2DConditionModel, monkeypatch: Any) -> None:
    holder = torch.nn.Module()
    holder.network = unet
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="flash-attn is not installed"):
        use_package(holder, "flash-attn", torch.float16, cpu)
    monkeypatch.setattr(torch_attention.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(BackendError, match="on a GPU"):
        use_package(holder, "flash-attn", torch.float32, cpu)


@pytest.mark.parametrize("name", [ComponentName.TEXT_ENCODER, ComponentName.VAE_DECODER])
def test_packages_are_for_the_unet_alone(name: ComponentName, pristine_bundle: Path) -> None:
    network = build_network(name, read_config(pristine_bundle, name))
    before = {key: type(part) for key, part in network.named_modules()}
    use_package(network, "flash-attn", torch.float32, torch.device("cpu"))
    assert {key: type(part) for key, part in network.named_modules()} == before
