"""Component -> ONNX graph, traced without its weights.

Every parameter is a fake tensor: shapes and types, no memory. What the graph computes from constants has real values,
because buffers stay real. The result's initializers are the network's weights by diffusers' names, and have no data;
`export.weights` binds them to the byte ranges of a file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sdopt.errors import ExportError
from sdopt.model.component import ComponentSpec, Config
from sdopt.model.precision import DType
from sdopt.model.recipe import Dialect
from sdopt.model.shape import Extent
from sdopt.networks.modules import build_network, count_attention_layers, default_dtype, tensor_names
from sdopt.weights.to_torch import TORCH_DTYPES

_OPSETS = {Dialect.NATIVE_ATTENTION: 23, Dialect.DECOMPOSED: 18}


@dataclass(frozen=True)
class TracedGraph:
    """A graph with its weights' names and shapes, and how many attention layers torch has in its place."""

    model: ir.Model
    weights: Mapping[str, tuple[int, ...]]
    attention_layers: int


def trace_component(
    spec: ComponentSpec, config: Config, extents: Mapping[str, Extent], *, dtype: DType, dialect: Dialect, dynamic: bool
) -> TracedGraph:
    """Trace a component at the usual sizes of `extents`, or with its named axes symbolic where `dynamic`.

    `dtype` is the type of weights and activations (fp32 or fp16). Raises `ExportError` where torch cannot be traced.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if dynamic else None)
    with default_dtype(TORCH_DTYPES[dtype]), init_empty_weights(include_buffers=False):
        network = build_network(spec.name, config)
    _fake_parameters(network, mode)
    inputs = _fake_inputs(spec, extents, mode)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                network, inputs, dynamo=True, optimize=False, verbose=False, opset_version=_OPSETS[dialect],
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=_dynamic_shapes(spec, extents) if dynamic else None,
            )  # fmt: skip
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ExportError(f"torch could not be traced: {spec.name}: {error}") from error
    assert program is not None
    if dynamic:
        _name_output_axes(program.model, spec, extents)
    weights = tensor_names(network)
    return TracedGraph(_drop_weight_data(program.model, weights, spec), weights, count_attention_layers(network))


def _fake_parameters(network: nn.Module, mode: FakeTensorMode) -> None:
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)


def _fake_inputs(spec: ComponentSpec, extents: Mapping[str, Extent], mode: FakeTensorMode) -> tuple[torch.Tensor, ...]:
    with mode:
        return tuple(torch.zeros(tensor.shape(extents), dtype=TORCH_DTYPES[tensor.dtype]) for tensor in spec.inputs)


def _dynamic_shapes(spec: ComponentSpec, extents: Mapping[str, Extent]) -> tuple[Any, ...]:
    """One entry an input: axes whose extent is a range are dynamic under their own name, the others keep their size."""

    def axes_of(axes: tuple[int | str, ...]) -> dict[int, str]:
        return {index: axis for index, axis in enumerate(axes) if isinstance(axis, str) and not extents[axis].is_static}

    shapes = [axes_of(tensor.axes) for tensor in spec.inputs]
    # The UNet takes what SDXL and LCM add as *extra, which is one argument to torch.export.
    named = 3 if spec.name == "unet" else len(shapes)
    return (*shapes[:named], tuple(shapes[named:])) if shapes[named:] else tuple(shapes)


def _name_output_axes(model: ir.Model, spec: ComponentSpec, extents: Mapping[str, Extent]) -> None:
    """torch writes formulas of the inputs' axes; a reader wants the names, and sizes that fit the model obey them."""
    for tensor, value in zip(spec.outputs, model.graph.outputs, strict=True):
        value.shape = ir.Shape(
            [extents[axis].opt if isinstance(axis, str) and extents[axis].is_static else axis for axis in tensor.axes]
        )


def _drop_weight_data(model: ir.Model, weights: Mapping[str, tuple[int, ...]], spec: ComponentSpec) -> ir.Model:
    """Rename the weights to diffusers' names and forget their fake data, so that no pass folds what is not there."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        bare = name.removeprefix("network.")
        if bare not in weights:
            continue
        value.const_value = None
        value.name = bare
    missing = weights.keys() - graph.initializers.keys()
    if missing:
        raise ExportError(f"{spec.name}: the graph does not use {len(missing)} weights, among them {min(missing)!r}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs a warning for each torchvision operator that is not installed, none of which is used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
