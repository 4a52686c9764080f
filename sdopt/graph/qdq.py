"""Quantise layers of a bound graph: Q/DQ (`QuantizeLinear`, `DequantizeLinear`) on activations, DQ alone on weights.

A quantised weight is an initializer of its stored type with a `DequantizeLinear` and nothing else: a `QuantizeLinear`
over float weights makes TensorRT-RTX lose them (tests/slow/test_plans.py), and a `Clip` between the two costs OpenVINO
its integer kernels. Weights keep torch's shape; the `Transpose` of a linear layer stays behind the `DequantizeLinear`,
which every runtime folds, while a weight that was stored transposed is transposed back at every run by OpenVINO.

No weight is read: scales are initializers by name, too, so one graph fits every checkpoint that is quantised alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdopt.errors import ExportError
from sdopt.graph.sites import WeightedLayer, WeightSite, find_sites, weight_name
from sdopt.model.quantization import INT4_BLOCK, Scheme

_WEIGHT_TYPES = {Scheme.FP8: ir.DataType.FLOAT8E4M3FN, Scheme.INT4_WEIGHTS: ir.DataType.INT4}


@dataclass(frozen=True)
class LayerChoice:
    """What becomes of a layer. With `smooth`, its input is multiplied by `{layer}.smooth` before it is quantised."""

    scheme: Scheme
    smooth: bool = False


def takes(layer: WeightedLayer, scheme: Scheme) -> bool:
    """Whether a layer can be quantised so: a table has no activations, INT4 wants whole blocks of inputs."""
    if layer.op == "Gather":
        return scheme is Scheme.INT8_WEIGHTS
    return scheme is not Scheme.INT4_WEIGHTS or (len(layer.shape) == 2 and layer.shape[1] % INT4_BLOCK == 0)


def weight_scale_name(layer: str) -> str:
    return f"{layer}.weight_scale"


def input_scale_name(layer: str) -> str:
    return f"{layer}.input_scale"


def smooth_name(layer: str) -> str:
    return f"{layer}.smooth"


def insert_qdq(model: ir.Model, choices: Mapping[str, LayerChoice]) -> None:
    """Quantise the named layers, in place. The new initializers have types and shapes, and no data yet.

    Raises `ExportError` for a layer that is not there, or that does not take its scheme.
    """
    sites = {site.layer.name: site for site in find_sites(model.graph)}
    if missing := choices.keys() - sites.keys():
        raise ExportError(f"the graph has no layer {min(missing)!r} to quantise")
    inputs = _Inputs(model.graph)
    for name, choice in choices.items():
        site = sites[name]
        if not takes(site.layer, choice.scheme):
            raise ExportError(f"the layer {name!r} ({site.layer.op}) cannot be quantised to {choice.scheme}")
        dtype = (site.weight if site.cast is None else site.cast.outputs[0]).dtype
        assert dtype is not None
        if choice.scheme.quantizes_activations:
            inputs.quantize(site, choice, dtype)
        _quantize_weight(model.graph, site, choice.scheme, dtype)
    common.TopologicalSortPass()(model)


def _add_initializer(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.initializers[name] = value
    return value


def _add_node(
    graph: ir.Graph, op: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType, attributes: dict[str, int],
    shape: ir.Shape | None,
) -> ir.Value:  # fmt: skip
    node = ir.node(op, inputs, attributes, name=f"{name}_{op}")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, shape
    graph.append(node)
    return node.outputs[0]


def _replace_weight(graph: ir.Graph, site: WeightSite, dtype: ir.DataType) -> ir.Value:
    """The weight as an initializer of the stored type `dtype`, under its own name; nothing uses it yet."""
    site.user.replace_input_with(site.index, None)
    if site.cast is not None:
        graph.remove(site.cast, safe=True)
    del graph.initializers[weight_name(site.layer.name)]
    return _add_initializer(graph, weight_name(site.layer.name), site.layer.shape, dtype)


def _quantize_weight(graph: ir.Graph, site: WeightSite, scheme: Scheme, dtype: ir.DataType) -> None:
    name, shape = site.layer.name, site.layer.shape
    stored = _replace_weight(graph, site, _WEIGHT_TYPES.get(scheme, ir.DataType.INT8))
    attributes, scale_shape = {"axis": 0}, shape[:1]
    if scheme is Scheme.INT4_WEIGHTS:
        attributes, scale_shape = {"axis": 1, "block_size": INT4_BLOCK}, (shape[0], shape[1] // INT4_BLOCK)
    scale = _add_initializer(graph, weight_scale_name(name), scale_shape, dtype)
    value = _add_node(
        graph, "DequantizeLinear", [stored, scale], f"{name}.dequantized", dtype, attributes, ir.Shape(shape)
    )
    site.user.replace_input_with(site.index, value)


class _Inputs:
    """The quantised inputs of a graph. Layers with one input share its pair of nodes: their scales are equal."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, Scheme], ir.Value] = {}
        self._zeros: dict[Scheme, ir.Value] = {}

    def quantize(self, site: WeightSite, choice: LayerChoice, dtype: ir.DataType) -> None:
        name, value = site.layer.name, site.node.inputs[0]
        assert value is not None
        if choice.smooth:
            smooth = _add_initializer(self._graph, smooth_name(name), site.layer.shape[1:2], dtype)
            smoothed = _add_node(self._graph, "Mul", [value, smooth], f"{name}.smoothed", dtype, {}, value.shape)
            site.node.replace_input_with(0, self._pair(name, smoothed, choice.scheme, dtype))
            return
        key = (value, choice.scheme)
        if key not in self._made:
            self._made[key] = self._pair(name, value, choice.scheme, dtype)
        site.node.replace_input_with(0, self._made[key])

    def _pair(self, name: str, value: ir.Value, scheme: Scheme, dtype: ir.DataType) -> ir.Value:
        scale = _add_initializer(self._graph, input_scale_name(name), (), dtype)
        zero = self._zero(scheme)
        assert zero.dtype is not None
        quantized = _add_node(
            self._graph, "QuantizeLinear", [value, scale, zero], f"{name}.input_quantized", zero.dtype, {}, value.shape
        )
        # Its zero point is 0 where none is said. ONNX Runtime 1.31 refuses a linear layer with a bias, of more than two
        # axes, where one is: it moves the pair behind a Reshape of its own, and there takes the type for UINT8.
        return _add_node(
            self._graph, "DequantizeLinear", [quantized, scale], f"{name}.input_dequantized", dtype, {}, value.shape
        )

    def _zero(self, scheme: Scheme) -> ir.Value:
        """Without a zero point QuantizeLinear gives UINT8; its type says which type is wanted."""
        if scheme not in self._zeros:
            dtype = _WEIGHT_TYPES.get(scheme, ir.DataType.INT8)
            name = f"zero_point_{dtype.name.lower()}"
            zero = ir.tensor(np.zeros((), dtype.numpy()), dtype=dtype, name=name)
            value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=zero)
            self._graph.initializers[name] = value
            self._zeros[scheme] = value
        return self._zeros[scheme]
