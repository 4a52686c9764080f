"""Inputs without an axis, given one: Triton's TensorRT backend compares ranks and takes no scalar."""

from __future__ import annotations

import onnx


def lift_scalars(model: onnx.ModelProto) -> None:
    """Make every scalar input of a graph one of shape [1], squeezed where it is used, in place."""
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        if shape.dim:
            continue
        scalar = f"{value.name}.scalar"
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == value.name:
                    node.input[place] = scalar
        model.graph.node.insert(
            0, onnx.helper.make_node("Squeeze", [value.name], [scalar], name=f"squeeze_{value.name}")
        )
        shape.dim.add().dim_value = 1
