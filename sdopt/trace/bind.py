"""Point a traced graph's weights at the byte ranges of its weight file.

Where a weight is kept in 16 bits and the graph computes in fp32, a `Cast` follows it: exact, and every runtime folds it
when it loads the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from sdopt.errors import ExportError
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.model.precision import DType
from sdopt.weights.dtypes import DTYPES
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.tensor_layout import plan_layout


def bind_weights(model: ir.Model, layout: Mapping[str, tuple[DType, tuple[int, ...]]], graph_dtype: DType) -> None:
    """Make every initializer without data external, in place. `layout` is the weight file's content.

    Raises `ExportError` where the graph names a weight that is not there, or one of another shape.
    """
    graph = model.graph
    places = plan_layout(Path(WEIGHTS_NAME), layout).tensors
    casts: list[ir.Node] = []
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        ref = places.get(name)
        if ref is None or value.shape is None or tuple(value.shape.numpy()) != ref.shape:
            raise ExportError(
                f"the graph needs the weight {name!r} of shape {value.shape}, which is missing from the weight file"
            )
        # base_dir is left empty: nothing is read here, and the graph is kept apart from its weights.
        tensor = ir.ExternalTensor(
            WEIGHTS_NAME, ref.offset_bytes, ref.nbytes, _ir_dtype(ref.dtype), shape=ir.Shape(ref.shape), name=name
        )
        if ref.dtype.is_float and ref.dtype is not graph_dtype:
            casts.append(_cast_up(graph, value, tensor, graph_dtype))
        value.const_value = tensor
        value.dtype = tensor.dtype
    for node in casts:
        graph.insert_before(graph[0], node)


def rebind_weights(model: ir.Model, places: Mapping[str, TensorRef]) -> None:
    """Point every initializer whose data are not in the graph at its place in a file beside it, in place.

    Raises `ExportError` for one that has no place, or one of another size.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            continue
        assert value.dtype is not None
        assert value.shape is not None
        shape = value.shape.numpy()
        ref = places.get(name)
        wanted_bytes = -(-math.prod(shape) * value.dtype.bitwidth // 8)
        if ref is None or ref.nbytes != wanted_bytes:
            raise ExportError(f"the graph names the weight {name!r} of {wanted_bytes} bytes, which no weight file has")
        value.const_value = ir.ExternalTensor(
            ref.file.name, ref.offset_bytes, ref.nbytes, value.dtype, shape=ir.Shape(shape), name=name
        )


def _ir_dtype(dtype: DType) -> ir.DataType:
    return ir.DataType(DTYPES[dtype].onnx)


def _cast_up(graph: ir.Graph, value: ir.Value, tensor: ir.ExternalTensor, graph_dtype: DType) -> ir.Node:
    uses = list(value.uses())
    widened = _ir_dtype(graph_dtype)
    node = ir.node("Cast", [value], {"to": widened}, name=f"cast_{value.name}")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = f"{value.name}.{graph_dtype}", tensor.shape, widened
    for user, index in uses:
        user.replace_input_with(index, output)
    return node
