"""A UNet's graph with the inputs that ComfyUI's TensorRT loader feeds, from a copy of the bundle's graph.

The loader (comfyanonymous/ComfyUI_TensorRT, tensorrt_loader.py) knows tensors by name: `x`, `timesteps` with an element
for each row, `context`, and for SDXL `y`, in which ComfyUI has already embedded the sizes. The first tensor must be
`x`, the last one is the output.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from sdopt.errors import ArtifactError

_RENAMED = {"sample": "x", "encoder_hidden_states": "context", "out_sample": "h"}
_ADDED = ("text_embeds", "time_ids")


def adapt_unet(model: onnx.ModelProto) -> None:
    """Change a UNet's graph in place. Weights are not touched: the weight file stays the bundle's.

    Raises `ArtifactError` for a graph that has other inputs than a UNet that was traced by sdopt.
    """
    graph = model.graph
    names = {value.name for value in graph.input}
    if (
        not {"sample", "timestep", "encoder_hidden_states"}
        <= names
        <= {
            "sample",
            "timestep",
            "encoder_hidden_states",
            *_ADDED,
        }
    ):
        raise ArtifactError(f"ComfyUI's TensorRT loader cannot feed a UNet with the inputs {', '.join(sorted(names))}")
    _free_names(graph, ("timesteps", "y", *_RENAMED.values()))
    rows = graph.input[0].type.tensor_type.shape.dim[0]
    inputs = {value.name: value for value in graph.input}
    inputs["timestep"] = _take_first(graph, rows)
    if set(_ADDED) <= names:
        inputs["y"] = _cut_added_embedding(graph)
    kept = [inputs[name] for name in ("sample", "timestep", "encoder_hidden_states", "y") if name in inputs]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.input[:]
    graph.input.extend(copies)
    _drop_unused(graph)
    for old, new in _RENAMED.items():
        _rename(graph, old, new)


def _take_first(graph: onnx.GraphProto, rows: onnx.TensorShapeProto.Dimension) -> onnx.ValueInfoProto:
    """The scalar is the first of `timesteps`: within a run of ComfyUI's samplers they are all the same."""
    index = onnx.helper.make_tensor("timesteps.index", onnx.TensorProto.INT64, [], [0])
    graph.initializer.append(index)
    graph.node.insert(0, onnx.helper.make_node("Gather", ["timesteps", index.name], ["timestep"], "timesteps.first"))
    size = rows.dim_param or rows.dim_value
    return onnx.helper.make_tensor_value_info("timesteps", onnx.TensorProto.FLOAT, [size])


def _cut_added_embedding(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    """Replace the concatenation of pooled text and embedded sizes by the input `y`, which is that concatenation."""
    text = _follow(graph, "text_embeds")
    found = [node for node in graph.node if node.op_type == "Concat" and node.input and node.input[0] in text]
    shapes = {value.name: value for value in graph.value_info}
    if len(found) != 1 or found[0].output[0] not in shapes:
        raise ArtifactError("this UNet joins the pooled text and the sizes in a way that sdopt does not know")
    (node,) = found
    joined = shapes[node.output[0]]
    graph.node.remove(node)
    _rename(graph, node.output[0], "y")
    y = onnx.ValueInfoProto.FromString(joined.SerializeToString())
    y.name = "y"
    return y


def _follow(graph: onnx.GraphProto, name: str) -> set[str]:
    """The value and its casts."""
    names = {name}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in names:
            names.add(node.output[0])
    return names


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output needs any more."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= {*node.input, *_names_inside(node)}
            kept.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(copies)
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _names_inside(node: onnx.NodeProto) -> Iterable[str]:
    """What the bodies of a node (an `If`, a `Loop`) read from outside."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from (*inner.input, *_names_inside(inner))


def _free_names(graph: onnx.GraphProto, wanted: Iterable[str]) -> None:
    for name in wanted:
        _rename(graph, name, f"{name}.inner")


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new
