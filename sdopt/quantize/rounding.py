"""Weights -> INT8, FP8 or INT4 with symmetric scales, and the file of them that graphs name.

Scales are rounded up in the type that they are stored in, and the weights are quantised with what is stored: nothing is
clipped, and no error comes of the scale's own rounding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdopt import progress
from sdopt.disk.files import disk_errors
from sdopt.errors import CalibrationError
from sdopt.model.precision import DType
from sdopt.model.quantization import INT4_BLOCK, Scheme
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.tensor_layout import Layout, plan_layout
from sdopt.weights.to_torch import TORCH_DTYPES, read_tensor

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as it is stored: `weight` is the checkpoint's.

    `input_amax` is the largest magnitude that its input's scale is made for, None where weights alone are quantised.
    `smooth` multiplies the input, channel by channel, and divides the weight.
    """

    weight: TensorRef
    scheme: Scheme
    input_amax: float | None = None
    smooth: Tensor | None = None


def quantize_weight(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] -> (stored, scale). Scales are [out]; [out, in / block] for INT4, two numbers in a byte."""
    values = weight.float()
    if smooth is not None:
        values = values / smooth.float().reshape(1, -1, *[1] * (values.ndim - 2))
    if scheme is Scheme.INT4_WEIGHTS:
        rows, inputs = values.shape
        blocks = values.reshape(rows, inputs // INT4_BLOCK, INT4_BLOCK)
        scale = _find_scale(blocks.abs().amax(dim=2), scheme, scale_dtype)
        levels = torch.round(blocks / scale.float()[..., None]).to(torch.int8)
        return _pack(levels.reshape(rows, inputs)), scale
    scale = _find_scale(values.flatten(1).abs().amax(dim=1), scheme, scale_dtype)
    scaled = values / scale.float().reshape(-1, *[1] * (values.ndim - 1))
    if scheme is Scheme.FP8:
        return scaled.to(torch.float8_e4m3fn), scale
    return torch.round(scaled).to(torch.int8), scale


def _find_scale(amax: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that keep every value within the scheme's largest; 1 for a channel of zeros."""
    exact = amax.double() / scheme.largest
    scale = exact.to(dtype)
    above = (scale.view(_BITS[dtype]) + 1).view(dtype)  # the next number, as scales are positive
    scale = torch.where(scale.double() < exact, above, scale)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def _pack(levels: Tensor) -> Tensor:
    """ONNX's INT4: the first of two numbers in the low half of their byte."""
    halves = levels.to(torch.uint8) & 0x0F
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def plan_quantized(path: Path, layers: Mapping[str, QuantizedLayer], scale_dtype: DType) -> Layout:
    """Types, shapes and places of everything that the layers need: weights, scales, and what smooths their inputs."""
    tensors: dict[str, tuple[DType, tuple[int, ...]]] = {}
    for name, layer in layers.items():
        shape, scale_shape = layer.weight.shape, layer.weight.shape[:1]
        if layer.scheme is Scheme.INT4_WEIGHTS:
            shape, scale_shape = (shape[0], shape[1] // 2), (shape[0], shape[1] // INT4_BLOCK)
        tensors[f"{name}.weight"] = layer.scheme.weight_dtype, shape
        tensors[f"{name}.weight_scale"] = scale_dtype, scale_shape
        if layer.input_amax is not None:
            tensors[f"{name}.input_scale"] = scale_dtype, ()
        if layer.smooth is not None:
            tensors[f"{name}.smooth"] = scale_dtype, tuple(layer.smooth.shape)
    return plan_layout(path, tensors)


def write_quantized(path: Path, layers: Mapping[str, QuantizedLayer], scale_dtype: DType) -> None:
    """Quantise the layers into a safetensors file. Raises `CalibrationError` for a scale of 0 or infinity."""
    layout = plan_quantized(path, layers, scale_dtype)
    dtype = TORCH_DTYPES[scale_dtype]
    with disk_errors(path), path.open("wb", buffering=0) as file:
        file.truncate(layout.size_bytes)
        _write_at(file.fileno(), 0, layout.header)
        for done, (name, layer) in enumerate(layers.items()):
            progress.update("quantising weights", done / len(layers))
            # As it is stored: what multiplies the input is exactly what the weight is divided by.
            smooth = None if layer.smooth is None else layer.smooth.to(dtype)
            weight = read_tensor(layer.weight)
            stored, scale = quantize_weight(weight, layer.scheme, dtype, smooth)
            _require_usable(name, scale, f"its weights reach {weight.abs().max().item():g}")
            made = {f"{name}.weight": stored, f"{name}.weight_scale": scale}
            if layer.input_amax is not None:
                made[f"{name}.input_scale"] = _input_scale(name, layer, dtype)
            if smooth is not None:
                made[f"{name}.smooth"] = smooth
            for key, tensor in made.items():
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert len(raw) == layout.tensors[key].nbytes
                _write_at(file.fileno(), layout.tensors[key].offset_bytes, raw)
        os.fsync(file.fileno())


def _input_scale(name: str, layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    assert layer.input_amax is not None
    scale = torch.tensor(layer.input_amax / layer.scheme.largest, dtype=torch.float64).to(dtype)
    _require_usable(name, scale, f"its inputs reach {layer.input_amax:g}")
    return scale


def _require_usable(name: str, scale: Tensor, reach: str) -> None:
    usable = scale.isfinite() & (scale > 0)
    if not bool(usable.all()):
        raise CalibrationError(
            f"the layer {name!r} has no usable scale: {reach}, which makes {scale[~usable].flatten()[0].item()}",
            hint="keep it in 16 bits: name it under `keep` in the quantization file",
        )


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
