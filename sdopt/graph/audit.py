"""What a graph says of itself: its nodes, its attention, and whether its external data is where it may be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from sdopt.artifacts.manifest import GraphAudit
from sdopt.errors import ArtifactError, UnsafeInputError

_GRAPH_LIMIT_BYTES = 2**31 - 1
_ITEMSIZE_BITS = {
    onnx.TensorProto.FLOAT: 32, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16, onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT32: 32, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8, onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.DOUBLE: 64,
}  # fmt: skip


def audit_graph(model: ir.Model, attention_layers: int) -> GraphAudit:
    """Count nodes and attention. With the opset 18 dialect an attention layer has one `Softmax` instead."""
    counts = Counter(node.op_type for node in model.graph)
    opset = model.opset_imports[""]
    attention = counts["Attention"] if opset >= 23 else counts["Softmax"]
    return GraphAudit(
        opset=opset, nodes=sum(counts.values()), attention_nodes=attention, attention_layers=attention_layers
    )


def require_fused_attention(name: str, audit: GraphAudit) -> None:
    """Raise `ArtifactError` where the graph has not one attention node for each attention layer of torch."""
    if audit.attention_nodes != audit.attention_layers:
        raise ArtifactError(
            f"{name} has {audit.attention_layers} attention layers in torch and {audit.attention_nodes} in its graph",
            hint="this is a defect of the tracer: please report it with the model's config.json",
        )


def check_graph_file(path: Path) -> onnx.ModelProto:
    """Parse a graph without its weights, and refuse external data that is not a plain range of a plain file beside it.

    onnx.checker passes truncated data and negative lengths, and runtimes follow what the file names: this check stands
    before them. Raises `UnsafeInputError` for a place that is not allowed and `ArtifactError` for a damaged file.
    """
    try:
        if path.stat().st_size > _GRAPH_LIMIT_BYTES:
            raise ArtifactError(f"{path} is larger than 2 GiB, which no ONNX graph is")
        model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ArtifactError:
        raise
    except Exception as error:  # protobuf's DecodeError has no public home that is the same in every version
        raise ArtifactError(f"{path} is no ONNX graph, or it is damaged: {error}") from error
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    return model


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found.extend([attribute.t, *attribute.tensors])
            for inner in [attribute.g, *attribute.graphs]:
                found.extend(_tensors(inner))
    return found


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if (
        not location
        or Path(location).name != location
        or location in (".", "..")
        or "\\" in location
        or "\0" in location
    ):
        raise UnsafeInputError(
            f"{path}: the data of {tensor.name!r} is said to lie in {location!r}, outside the graph's folder"
        )
    file = path.parent / location
    if file.is_symlink() or (file.exists() and (not file.is_file() or file.stat().st_nlink > 1)):
        raise UnsafeInputError(
            f"{file} is a link, and weights must be a plain file", hint="replace it with a copy of what it links to"
        )
    if not file.exists():
        raise ArtifactError(f"{path} needs {file}, which is missing")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except ValueError as error:
        raise UnsafeInputError(f"{path}: the place of {tensor.name!r} is no number") from error
    expected = _ITEMSIZE_BITS.get(tensor.data_type, 0) // 8
    for side in tensor.dims:
        expected *= side
    if offset < 0 or length != expected:
        raise UnsafeInputError(
            f"{path}: the data of {tensor.name!r} should have {expected} bytes, not {length} at {offset}"
        )
    if offset + length > file.stat().st_size:
        raise ArtifactError(f"{file} is truncated: {tensor.name!r} lies beyond its end", hint="build the bundle again")
