"""fp16, bf16 or fp32 for the VAE: by what is measured, and with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights

from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert import vae_precision
from sdopt.convert.decide import open_plan
from sdopt.convert.plan import BuildPlan
from sdopt.convert.vae_precision import HalfMeasurement
from sdopt.fidelity.metrics import PictureFault, find_fault
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.model.recipe import BuildRecipe
from sdopt.model.target import parse_target
from sdopt.networks.modules import build_network
from sdopt.networks.overflow import find_largest, watch_magnitudes
from sdopt.weights.to_torch import load_weights
from tests.conftest import TINY_SHAPES
from tests.planted_overflow import DECODER_LAYER, ENCODER_LAYER, plant_overflow

DECODER, ENCODER, UNET = ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER, ComponentName.UNET
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_overflow(tmp_path_factory.mktemp("planted") / "model")


def plan(
    source: Path, target: str = "rtx:sm89", precision: Precision = Precision.AUTO,
    fixed: dict[ComponentName, Precision] | None = None,
) -> BuildPlan:  # fmt: skip
    recipe = BuildRecipe(
        source=str(source), target=parse_target(target), precision=precision, component_precision=fixed or {}
    )
    opened = open_plan(recipe)
    assert opened.recipe == recipe.model_copy(update={"source": str(source.resolve())}), "the recipe is the user's"
    return opened


def decode(source: Path, dtype: torch.dtype) -> torch.Tensor:
    """What the VAE's decoder paints of seeded latents, [height, width, 3] in about 0..1."""
    part = open_checkpoint(str(source)).components[DECODER]
    with init_empty_weights(include_buffers=False):
        network = build_network(DECODER, part.config)
    load_weights(network, part.tensors, dtype)
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) / 0.6
    with torch.inference_mode():
        return network(latent.to(dtype))[0].float().permute(1, 2, 0) / 2 + 0.5


def test_a_vae_that_fp16_holds_computes_in_fp16() -> None:
    opened = plan(TINY_SHAPES)
    for name in (DECODER, ENCODER):
        part = opened.components[name]
        assert part.precision is Precision.FP16
        assert "of fp16's 65504" in part.precision_reason
    assert opened.components[UNET].precision_reason == ""


def test_the_planted_vae_paints_nothing_in_fp16_and_the_same_picture_in_fp32_and_bf16(planted: Path) -> None:
    assert find_fault(decode(TINY_SHAPES, torch.float16).numpy()) is None
    assert find_fault(decode(planted, torch.float16).numpy()) is PictureFault.NOT_FINITE
    sound = decode(TINY_SHAPES, torch.float32)
    assert torch.allclose(decode(planted, torch.float32), sound, atol=1e-4)
    assert torch.allclose(decode(planted, torch.bfloat16), sound, atol=0.05)


@pytest.mark.parametrize("precision", [Precision.AUTO, Precision.FP16])
def test_a_vae_that_overflows_computes_in_bf16(planted: Path, precision: Precision) -> None:
    opened = plan(planted, precision=precision)
    for name, layer in ((DECODER, DECODER_LAYER), (ENCODER, ENCODER_LAYER)):
        part = opened.components[name]
        assert (part.precision, part.graph_dtype) == (Precision.BF16, DType.BF16)
        assert {tensor.dtype for tensor in (*part.spec.inputs, *part.spec.outputs)} == {DType.BF16}
        assert "fp16 could overflow" in part.precision_reason
        assert layer in part.precision_reason
        assert "dB" in part.precision_reason
    assert opened.components[UNET].precision is Precision.FP16


@pytest.mark.parametrize("target", ["onnxruntime", "cuda"])
def test_a_runtime_without_bf16_graphs_takes_fp32(planted: Path, target: str) -> None:
    opened = plan(planted, target, Precision.FP16)
    part = opened.components[DECODER]
    assert (part.precision, part.graph_dtype) == (Precision.FP32, DType.FP32)
    assert "takes no bf16 graph" in part.precision_reason
    assert opened.components[UNET].precision is Precision.FP16


def test_each_half_is_judged_by_itself(tmp_path: Path) -> None:
    opened = plan(plant_overflow(tmp_path / "model", [ENCODER_LAYER]))
    assert opened.components[ENCODER].precision is Precision.BF16
    assert opened.components[DECODER].precision is Precision.FP16


def test_a_fixed_precision_stays_and_the_reason_warns(planted: Path) -> None:
    opened = plan(planted, fixed={DECODER: Precision.FP16})
    assert opened.components[DECODER].precision is Precision.FP16
    assert "fixed by the recipe, which could overflow" in opened.components[DECODER].precision_reason
    assert opened.components[ENCODER].precision is Precision.BF16


def test_bf16_that_is_too_coarse_for_the_picture_gives_way_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = HalfMeasurement("decoder.conv_in", 1e6, bf16_psnr_db=31.0)
    monkeypatch.setattr(vae_precision, "_find_or_measure", lambda _: {DECODER: coarse, ENCODER: coarse})
    part = plan(TINY_SHAPES).components[DECODER]
    assert (part.precision, part.graph_dtype) == (Precision.FP32, DType.FP32)
    assert "31.0 dB from fp32's (at least 40 dB)" in part.precision_reason


@pytest.mark.parametrize(("target", "precision"), [("openvino", Precision.BF16), ("rtx", Precision.FP32)])
def test_nothing_is_measured_where_nothing_computes_in_fp16(
    target: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_precision, "call", lambda *_: pytest.fail("a child was started"))
    assert not any(part.precision_reason for part in plan(TINY_SHAPES, target, precision).components.values())


def test_what_was_measured_is_kept_for_every_target(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(planted)
    monkeypatch.setattr(vae_precision, "call", lambda *_: pytest.fail("a child was started"))
    assert plan(planted, "tensorrt").components[DECODER].precision_reason == first.components[
        DECODER
    ].precision_reason  # fmt: skip
    assert plan(planted, "cuda").components[DECODER].precision is Precision.FP32


def test_a_vae_that_is_broken_in_fp32_is_left_to_the_verdict(tmp_path: Path) -> None:
    folder = plant_overflow(tmp_path / "model", [DECODER_LAYER] * 2)  # its weights are infinite
    part = plan(folder).components[DECODER]
    assert part.precision is Precision.FP32
    assert "largest value inf of" in part.precision_reason


class Residual(torch.nn.Module):
    """An attention layer as diffusers has them, and a sum that no inner module gives."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.heads = 2

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.to_q(value), self.to_k(value)
        return value + value


def test_sums_parameters_and_logits_are_seen_and_hooks_are_taken_back() -> None:
    network = torch.nn.Sequential(Residual())
    attention = network[0]
    with torch.no_grad():
        attention.to_q.weight.fill_(2.0)
        attention.to_k.weight.fill_(3.0)
        attention.to_q.bias.fill_(-500.0)
        attention.to_k.bias.zero_()
    with watch_magnitudes(network) as seen, torch.inference_mode():
        network(torch.ones(1, 3, 8))
    # q = 16 - 500, k = 24, over the 4 channels of a head, divided by the root of 4.
    assert seen["0.logits"] == pytest.approx(484 * 24 * 4 / 2)
    assert seen["0"] == 2.0
    assert seen["0.to_q.bias"] == 500.0
    assert find_largest(seen) == ("0.logits", seen["0.logits"])
    before = dict(seen)
    network(torch.full((1, 3, 8), 9.0))
    assert seen == before
    with watch_magnitudes(network) as seen:
        network(torch.full((1, 3, 8), torch.nan))
    assert seen["0"] == float("inf")
