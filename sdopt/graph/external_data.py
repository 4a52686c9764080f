"""Whether a graph's external data stays inside its folder: a graph is input from a stranger."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from sdopt.errors import ArtifactError, UnsafeInputError
from sdopt.weights.dtypes import BY_ONNX

_GRAPH_LIMIT_BYTES = 2**31 - 1
_ITEMSIZE_BITS = {number: 8 * dtype.itemsize_bytes for number, dtype in BY_ONNX.items()} | {onnx.TensorProto.INT4: 4}
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
# int() also takes underscores, spaces and other scripts' digits, which other readers do not.
_NUMBER = re.compile(r"[0-9]{1,18}\Z")


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
        raise ArtifactError(f"{path} is not an ONNX graph, or it is damaged: {error}") from error
    for tensor in _model_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    return model


def _model_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, wherever the format lets one be."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        yield from _attribute_tensors(function.attribute_proto)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        # Most attributes hold no graph; to look into the empty one that protobuf gives would be slow.
        for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            yield from _graph_tensors(inner)


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or entries.keys() - _EXTERNAL_KEYS:
        # Readers differ in which of two they take.
        raise UnsafeInputError(f"{path}: {tensor.name!r} names its data's place twice, or in an unknown way")
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
    numbers = entries.get("offset", "0"), entries.get("length", "")
    if not all(_NUMBER.match(text) for text in numbers) or any(side < 0 for side in tensor.dims):
        raise UnsafeInputError(f"{path}: the place or shape of {tensor.name!r} is not a plain number: {numbers}")
    offset, length = map(int, numbers)
    bits = _ITEMSIZE_BITS.get(tensor.data_type, 0)
    for side in tensor.dims:
        bits *= side
    expected = -(-bits // 8)  # two INT4 numbers share a byte
    if length != expected:
        raise UnsafeInputError(
            f"{path}: the data of {tensor.name!r} should have {expected} bytes, not {length} at {offset}"
        )
    if offset + length > file.stat().st_size:
        raise ArtifactError(f"{file} is truncated: {tensor.name!r} lies beyond its end", hint="build the bundle again")
