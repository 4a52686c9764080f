"""Where the weights of torch's layers come into a graph: what quantisation and LoRA slots change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

_COMPUTE = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class WeightedLayer:
    """A layer with a weight: its name in torch, and the weight's shape there. `op` is its node in the graph."""

    name: str
    op: str
    shape: tuple[int, ...]


def weight_name(layer: str) -> str:
    return f"{layer}.weight"


def list_layers(model: ir.Model) -> dict[str, WeightedLayer]:
    """The layers with a weight of their own, by name in the order of the graph."""
    return {site.layer.name: site.layer for site in find_sites(model.graph)}


@dataclass(frozen=True)
class WeightSite:
    """Where a layer's weight comes in: `node` takes it, by `user` at the input `index`; `cast` widens it before, or
    dequantises it.
    """

    layer: WeightedLayer
    weight: ir.Value
    cast: ir.Node | None
    user: ir.Node
    index: int
    node: ir.Node


def find_sites(graph: ir.Graph) -> Iterator[WeightSite]:
    """Each layer whose weight one node takes, in the order of the graph's weights."""
    for name, weight in graph.initializers.items():
        if not name.endswith(".weight") or weight.shape is None or len(weight.shape) < 2:
            continue
        value, cast = weight, None
        uses = list(value.uses())
        if len(uses) == 1 and uses[0].node.op_type in ("Cast", "DequantizeLinear"):
            cast = uses[0].node
            value = cast.outputs[0]
            uses = list(value.uses())
        if len(uses) != 1:
            continue  # a weight that two layers share has two inputs to calibrate
        user, index = uses[0]
        node = user
        if user.op_type == "Transpose":
            after = list(user.outputs[0].uses())
            if len(after) != 1:
                continue
            node = after[0].node
        if node.op_type in _COMPUTE or (node.op_type == "Gather" and node is user and index == 0):
            shape = tuple(int(side) for side in weight.shape.numpy())
            layer = WeightedLayer(name.removesuffix(".weight"), node.op_type, shape)
            yield WeightSite(layer, weight, cast, user, index, node)
