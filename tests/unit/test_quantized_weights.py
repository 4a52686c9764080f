"""Weights in INT8, FP8 and INT4: how far they are from what they were, and the file that holds them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdopt.errors import CalibrationError
from sdopt.model.precision import DType
from sdopt.model.quantization import INT4_BLOCK, Scheme
from sdopt.quantize.rounding import QuantizedLayer, plan_quantized, quantize_weight, write_quantized
from sdopt.weights.safetensors_header import read_header

INT8, FP8, W8, W4 = Scheme.INT8, Scheme.FP8, Scheme.INT8_WEIGHTS, Scheme.INT4_WEIGHTS
DTYPES = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}
scale_dtypes = st.sampled_from(list(DTYPES.values()))
shapes = st.sampled_from([(1, 1), (3, 5), (4, 2, 3, 3), (2, 130), (7, 1, 1, 1)])
# What a channel's weights may reach: from below what fp16 can say to the most that a checkpoint in 16 bits holds.
sizes = st.floats(min_value=1e-9, max_value=6e4)
seeds = st.integers(0, 2**32)


def make_weight(shape: tuple[int, ...], size: float, seed: int, *, outlier: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator) * 2 - 1
    weight.flatten()[0] = outlier  # some channels are as large as they may be, and some are smaller
    return weight * size


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.double() * scale.double().reshape(-1, *[1] * (stored.ndim - 1))


def unpack(stored: Tensor) -> Tensor:
    low, high = (stored.to(torch.int32) & 15), (stored.to(torch.int32) >> 4)
    nibbles = torch.stack([low, high], dim=2).reshape(stored.shape[0], -1)
    return nibbles - 16 * (nibbles > 7)


@given(shapes, sizes, seeds, scale_dtypes, st.sampled_from([INT8, W8]))
@settings(deadline=None)
def test_int8_is_half_a_level_off_at_most(
    shape: tuple[int, ...], size: float, seed: int, dtype: torch.dtype, scheme: Scheme
) -> None:
    weight = make_weight(shape, size, seed)
    stored, scale = quantize_weight(weight, scheme, dtype)
    assert (stored.dtype, stored.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (dtype, shape[:1])
    assert bool((scale > 0).all())
    assert int(stored.to(torch.int32).abs().max()) <= 127, "-128 would make the range lopsided"
    off = (dequantize(stored, scale) - weight.double()).abs()
    half = scale.double().reshape(-1, *[1] * (len(shape) - 1)) / 2
    # fp32 divides by the scale: what lies within its rounding of the middle of two levels may go to either.
    assert bool((off <= half * (1 + 127 * 2**-22)).all())


@given(shapes, sizes, seeds, scale_dtypes)
@settings(deadline=None)
def test_a_scale_is_the_smallest_that_clips_nothing(
    shape: tuple[int, ...], size: float, seed: int, dtype: torch.dtype
) -> None:
    weight = make_weight(shape, size, seed)
    _, scale = quantize_weight(weight, INT8, dtype)
    amax, kind = weight.flatten(1).abs().amax(dim=1).double(), torch.finfo(dtype)
    assert bool((scale.double() * 127 >= amax).all()), "the largest weight would be clipped"
    step = torch.maximum(scale.double() * kind.eps, torch.tensor(kind.smallest_normal * kind.eps))
    assert bool(((scale.double() - step) * 127 < amax).all()), "a smaller one would do"


@given(st.integers(1, 6), sizes, seeds, scale_dtypes)
@settings(deadline=None)
def test_fp8_is_its_own_rounding_off_at_most(rows: int, size: float, seed: int, dtype: torch.dtype) -> None:
    weight = make_weight((rows, 40), size, seed)
    stored, scale = quantize_weight(weight, FP8, dtype)
    assert stored.dtype is torch.float8_e4m3fn
    assert bool(stored.float().isfinite().all()), "E4M3 has no infinity: what is too large becomes NaN"
    off = (dequantize(stored.float(), scale) - weight.double()).abs()
    # Three bits behind the point, and steps of 2^-9 for what is smaller than 2^-6.
    step = torch.maximum(weight.double().abs() * 2**-4, scale.double()[:, None] * 2**-10)
    assert bool((off <= step * (1 + 2**-20)).all())


@given(st.integers(1, 5), st.integers(1, 3), sizes, seeds, scale_dtypes)
@settings(deadline=None)
def test_int4_is_half_a_level_of_its_block_off(
    rows: int, blocks: int, size: float, seed: int, dtype: torch.dtype
) -> None:
    inputs = blocks * INT4_BLOCK
    # Blocks differ a thousandfold: a scale for the whole row would make zeros of the small ones.
    weight = make_weight((rows, inputs), size, seed) * torch.logspace(0, -3, blocks).repeat_interleave(INT4_BLOCK)
    stored, scale = quantize_weight(weight, W4, dtype)
    assert (stored.dtype, stored.shape) == (torch.uint8, (rows, inputs // 2))
    assert (scale.dtype, scale.shape) == (dtype, (rows, blocks))
    levels = unpack(stored)
    assert int(levels.abs().max()) <= 7
    wide = scale.double().repeat_interleave(INT4_BLOCK, dim=1)
    assert bool(((levels * wide - weight.double()).abs() <= wide / 2 * (1 + 7 * 2**-22)).all())


@given(seeds)
def test_every_int4_level_is_packed_where_onnx_looks_for_it(seed: int) -> None:
    order = torch.randperm(INT4_BLOCK, generator=torch.Generator().manual_seed(seed))
    levels = (torch.arange(INT4_BLOCK) % 15 - 7)[order]
    stored, scale = quantize_weight(levels[None].float() * 0.5, W4, torch.float32)
    assert scale.item() == 0.5
    assert torch.equal(unpack(stored)[0], levels)
    from onnx import TensorProto, numpy_helper

    proto = TensorProto(dims=[1, INT4_BLOCK], data_type=TensorProto.INT4, raw_data=stored.numpy().tobytes())
    assert np.array_equal(numpy_helper.to_array(proto).astype(np.int64)[0], levels.numpy())


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_channel_of_zeros_has_a_scale_that_divides(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 256)
    weight[1] = 0
    stored, scale = quantize_weight(weight, scheme, dtype)
    assert bool((scale[1] == 1).all())
    assert bool((scale > 0).all())
    assert not bool(stored[1].float().any())
    assert bool(stored[0].float().all())


@pytest.mark.parametrize("scheme", [INT8, FP8])
@given(seeds, st.floats(-4, 4))
@settings(deadline=None)
def test_smoothing_moves_size_from_inputs_into_weights_and_changes_no_product(
    scheme: Scheme, seed: int, decades: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(5, 6, generator=generator), torch.randn(4, 6, generator=generator)
    smooth = torch.logspace(0, decades, 6)
    stored, scale = quantize_weight(weight, scheme, torch.float32, smooth)
    plain, plain_scale = quantize_weight(weight / smooth, scheme, torch.float32)
    assert torch.equal(stored.float(), plain.float())
    assert torch.equal(scale, plain_scale)
    product = (inputs * smooth).double() @ dequantize(stored.float(), scale).T
    levels = 127 if scheme is INT8 else 14
    reach = (inputs * smooth).double().abs() @ (weight / smooth).double().abs().amax(dim=1, keepdim=True).T.expand(6, 5)
    assert bool(((product - inputs.double() @ weight.double().T).abs() <= reach / levels).all())


# Files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    shapes = {"conv": (6, 4, 3, 3), "linear": (8, 256), "wide": (5, 384), "table": (9, 10), "eights": (16, 16)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    path = tmp_path / "checkpoint.safetensors"
    save_file(weights, path)
    return path


def describe(checkpoint: Path) -> dict[str, QuantizedLayer]:
    tensors = read_header(checkpoint).tensors
    smooth = torch.linspace(0.1, 3, 256)
    return {
        "conv": QuantizedLayer(tensors["conv.weight"], INT8, input_amax=3.0),
        "linear": QuantizedLayer(tensors["linear.weight"], INT8, input_amax=5.0, smooth=smooth),
        "wide": QuantizedLayer(tensors["wide.weight"], W4),
        "table": QuantizedLayer(tensors["table.weight"], W8),
        "eights": QuantizedLayer(tensors["eights.weight"], FP8, input_amax=448.0),
    }


@pytest.mark.parametrize("kind", DTYPES)
def test_a_file_is_what_it_was_planned_to_be(kind: DType, checkpoint: Path, tmp_path: Path) -> None:
    layers, path = describe(checkpoint), tmp_path / "quantized.safetensors"
    planned = plan_quantized(path, layers, kind)
    write_quantized(path, layers, kind)
    assert path.stat().st_size == planned.size_bytes
    assert read_header(path).tensors == planned.tensors
    held = load_file(path)
    assert {name: (DTYPES.get(ref.dtype, held[name].dtype), ref.shape) for name, ref in planned.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()
    }
    assert sorted(held) == sorted(
        [f"{name}.{part}" for name in layers for part in ("weight", "weight_scale")]
        + ["conv.input_scale", "linear.input_scale", "eights.input_scale", "linear.smooth"]
    )
    assert held["wide.weight"].shape == (5, 192)
    assert held["wide.weight_scale"].shape == (5, 3)
    assert held["table.weight_scale"].shape == (9,)
    assert held["conv.input_scale"].shape == ()
    assert held["conv.input_scale"].item() == pytest.approx(3 / 127, rel=2**-7)
    assert held["eights.input_scale"].item() == 1
    weights = load_file(checkpoint)
    for name, layer in layers.items():
        stored, scale = quantize_weight(
            weights[f"{name}.weight"], layer.scheme, DTYPES[kind], held.get(f"{name}.smooth")
        )
        assert torch.equal(held[f"{name}.weight"].view(torch.uint8), stored.view(torch.uint8)), name
        assert torch.equal(held[f"{name}.weight_scale"].flatten(), scale.flatten()), name


@pytest.mark.parametrize("kind", DTYPES)
def test_a_weight_is_divided_by_the_factor_that_the_graph_multiplies_with(
    kind: DType, checkpoint: Path, tmp_path: Path
) -> None:
    """In bf16 a factor is off by up to 0.4 %: divided by the exact one, every product would be off by as much."""
    layer = describe(checkpoint)["linear"]
    assert layer.smooth is not None
    assert not torch.equal(layer.smooth.to(torch.bfloat16).float(), layer.smooth)
    write_quantized(tmp_path / "q.safetensors", {"linear": layer}, kind)
    held, weight = load_file(tmp_path / "q.safetensors"), load_file(checkpoint)["linear.weight"].double()
    effective = dequantize(held["linear.weight"], held["linear.weight_scale"]) * held["linear.smooth"].double()
    half = held["linear.weight_scale"].double()[:, None] * held["linear.smooth"].double() / 2
    assert bool(((effective - weight).abs() <= half * 1.0001).all())


def test_two_checkpoints_of_one_architecture_have_one_layout(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: tensor * 7 for name, tensor in load_file(checkpoint).items()}, other)
    files = []
    for source in (checkpoint, other):
        files.append(tmp_path / f"q-{source.stem}.safetensors")
        write_quantized(files[-1], describe(source), DType.FP16)
    a, b = (read_header(file).tensors for file in files)
    assert {name: ref.offset_bytes for name, ref in a.items()} == {name: ref.offset_bytes for name, ref in b.items()}
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_quantised_file_is_about_half_of_16_bits(checkpoint: Path, tmp_path: Path) -> None:
    layers = describe(checkpoint)
    planned = plan_quantized(tmp_path / "q", layers, DType.FP16)
    for name, layer in layers.items():
        share = sum(ref.nbytes for key, ref in planned.tensors.items() if key.startswith(f"{name}.weight"))
        small = name == "table" or len(layer.weight.shape) == 4 or name == "eights"
        assert share <= layer.weight.nbytes * (0.62 if small else {INT8: 0.51, W4: 0.26}[layer.scheme])


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan, 1e-60])
def test_an_input_without_a_usable_scale_is_refused_by_name(
    kind: DType, amax: float, checkpoint: Path, tmp_path: Path
) -> None:
    layer = QuantizedLayer(read_header(checkpoint).tensors["linear.weight"], INT8, input_amax=amax)
    with pytest.raises(CalibrationError, match=r"'blocks\.7\.linear' has no usable scale") as caught:
        write_quantized(tmp_path / "q.safetensors", {"blocks.7.linear": layer}, kind)
    assert "keep" in caught.value.hint


def test_a_scale_that_fp16_cannot_hold_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ref = read_header(checkpoint).tensors["linear.weight"]
    layer = QuantizedLayer(ref, INT8, input_amax=1e7)
    write_quantized(tmp_path / "q.safetensors", {"linear": layer}, DType.FP32)
    with pytest.raises(CalibrationError, match=r"inputs reach 1e\+07, which makes inf"):
        write_quantized(tmp_path / "q.safetensors", {"linear": layer}, DType.FP16)


def test_a_weight_whose_scale_is_infinite_is_refused(tmp_path: Path) -> None:
    """Smoothing divides by as little as 1e-4: what fp16 held may need a scale that it does not."""
    save_file({"w": torch.full((3, 8), 60000.0).half()}, tmp_path / "w.safetensors")
    smooth = torch.full((8,), 1e-4)
    layer = QuantizedLayer(read_header(tmp_path / "w.safetensors").tensors["w"], INT8, input_amax=1.0, smooth=smooth)
    write_quantized(tmp_path / "q.safetensors", {"big": layer}, DType.FP32)
    with pytest.raises(CalibrationError, match="'big' has no usable scale: its weights reach 60000"):
        write_quantized(tmp_path / "q.safetensors", {"big": layer}, DType.FP16)
