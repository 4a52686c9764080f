"""Where torch's layers are in a graph, and a copy of the graph that gives what they compute.

A node says nothing of the module that it came from (`ClearMetadataAndDocStringPass`), but a weight is named as in
torch: the last node that takes a module's weight or bias gives that module's output. Attention has no weights of its
own; its output is what the projection after it takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from sdopt.graph.external_data import check_graph_file
from sdopt.model.precision import DType
from sdopt.weights.dtypes import BY_ONNX, DTYPES

_PROJECTIONS = (".to_out.0", ".out_proj")


@dataclass(frozen=True)
class LayerValue:
    """`value` of the graph is what torch's module `layer` gives; with `before`, what the module `before` is given."""

    layer: str
    value: str
    dtype: DType
    before: str = ""


def list_layer_values(graph: Path) -> list[LayerValue]:
    """Every layer with weights and every attention, in the order of the graph.

    Raises what `check_graph_file` raises.
    """
    model = check_graph_file(graph)
    dtypes = _find_dtypes(model)
    inputs, outputs = _find_ends(model.graph)
    found: list[tuple[int, LayerValue]] = []
    for layer, (place, value) in outputs.items():
        found.append((place, LayerValue(layer, value, dtypes.get(value, DType.FP32))))
        suffix = next((suffix for suffix in _PROJECTIONS if layer.endswith(suffix)), "")
        if suffix and layer in inputs:
            place, value = inputs[layer]
            found.append((place, LayerValue(layer.removesuffix(suffix), value, dtypes.get(value, DType.FP32), layer)))
    return [value for _, value in sorted(found, key=lambda item: item[0])]


_Places = dict[str, tuple[int, str]]


def _find_ends(graph: onnx.GraphProto) -> tuple[_Places, _Places]:
    """By layer, the value that goes into its first node and the one that its last node gives, with their places."""
    owners = {tensor.name: tensor.name.rpartition(".")[0] for tensor in graph.initializer}
    inputs: _Places = {}
    outputs: _Places = {}
    for place, node in enumerate(graph.node):
        owner = next((owners[name] for name in node.input if owners.get(name)), "")
        if node.op_type != "Gather" and all(name in owners for name in node.input if name):
            # A weight in another type or shape. CLIP's table of positions gives the same rows for every input, and is a
            # layer all the same.
            owners |= dict.fromkeys(node.output, owner)
        elif owner:
            data = next((name for name in node.input if name and name not in owners), "")
            if data:
                inputs.setdefault(owner, (place - 1, data))
            outputs[owner] = (place, node.output[0])
    return inputs, outputs


def _find_dtypes(model: onnx.ModelProto) -> dict[str, DType]:
    values = (*model.graph.value_info, *model.graph.output)
    dtypes = ((value.name, BY_ONNX.get(value.type.tensor_type.elem_type)) for value in values)
    return {name: dtype for name, dtype in dtypes if dtype is not None and dtype.is_float}


def write_with_outputs(graph: Path, values: Iterable[LayerValue], target: Path) -> None:
    """A copy of `graph` with `values` among its outputs. Its weights must lie beside the copy, too."""
    model = check_graph_file(graph)
    present = {output.name for output in model.graph.output}
    for value in values:
        if value.value not in present:
            present.add(value.value)
            output = model.graph.output.add()
            output.name = value.value
            output.type.tensor_type.elem_type = DTYPES[value.dtype].onnx
    onnx.save_model(model, target)
