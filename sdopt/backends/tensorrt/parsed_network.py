"""ONNX graph -> TensorRT network. Weights stay mapped from the weight file, and pages that were read are given back.

The parser keeps pointers into the mapping, so the build happens inside `parse_graph`. TensorRT reads each weight a few
times; its pages go in between, so that the weight file does not count in the peak of resident memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdopt.backends.tensorrt.messages import Messages, make_logger
from sdopt.backends.tensorrt.weight_search import WeightRange, WeightSearch
from sdopt.errors import BackendError

_DROP_EVERY_S = 0.2
_COUNTED_BYTES = 64 << 10


@dataclass(frozen=True)
class ParsedNetwork:
    """`network` of the library's type, with what must live as long. `weights_bytes` are of the tensors that it uses."""

    library: Any
    builder: Any
    network: Any
    messages: Messages
    weights_bytes: int
    weights_zero_share: float
    search: WeightSearch


@contextmanager
def parse_graph(library: Any, model: onnx.ModelProto, weights: Path, *, component: str) -> Iterator[ParsedNetwork]:
    """Parse a graph, whose external data were checked to lie inside the file `weights`.

    Raises `BackendError` that names the component, the node and what to do, for a node that the parser refuses.
    """
    messages = Messages()
    logger = make_logger(library, messages)
    builder = library.Builder(logger)
    # TensorRT 11 and RTX know no other kind of network; 10 does.
    strongly_typed = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = library.OnnxParser(network, logger)
    with _mapped(weights) as bytes_of_file:
        if not parser.load_model_proto(model.SerializeToString(), str(weights)):
            raise BackendError(f"TensorRT cannot read the graph of {component}: {_first_error(parser, messages)}")
        used = list(_external_weights(model))
        for weight in used:
            if not parser.load_initializer(weight.name, bytes_of_file.ctypes.data + weight.offset, weight.length):
                raise BackendError(f"TensorRT refuses the weight {weight.name!r} of {component}: {messages.text}")
        if not parser.parse_model_proto():
            raise _refused(parser, messages, component)
        total, zero_share = sum(weight.length for weight in used), _zero_share(bytes_of_file, used)
        search = WeightSearch(used, bytes_of_file)
        yield ParsedNetwork(library, builder, network, messages, total, zero_share, search)


def _external_weights(model: onnx.ModelProto) -> Iterator[WeightRange]:
    cast = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(place["offset"]), int(place["length"])
            shape, is_widened = tuple(tensor.dims), tensor.name in cast
            yield WeightRange(tensor.name, offset, length, tensor.data_type, shape, is_widened)


def _zero_share(data: np.ndarray[Any, Any], weights: list[WeightRange]) -> float:
    """Share of zero bytes, by the beginning of each weight: to count all of them takes seconds."""
    zeros = 0.0
    for weight in weights:
        part = data[weight.offset : weight.offset + min(weight.length, _COUNTED_BYTES)]
        zeros += weight.length * (1 - int(np.count_nonzero(part)) / max(1, part.size))
    return zeros / max(1, sum(weight.length for weight in weights))


@contextmanager
def _mapped(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The file as read-only bytes; a thread gives the pages that were read back to the system while the body runs."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    done = threading.Event()

    def drop_pages() -> None:
        # Clean pages of a read-only mapping: the next access reads them again, from the page cache.
        while not done.wait(_DROP_EVERY_S):
            mapping.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=drop_pages, daemon=True)
    thread.start()
    try:
        yield np.frombuffer(mapping, np.uint8)
    finally:
        done.set()
        thread.join()


def _refused(parser: Any, messages: Messages, component: str) -> BackendError:
    if not parser.num_errors:
        return BackendError(f"TensorRT refuses the graph of {component}: {messages.text}")
    error = parser.get_error(0)
    return BackendError(
        f"TensorRT refuses the node {error.node_name()!r} ({error.node_operator()}) of {component}: {error.desc()}",
        hint='try --recipe with dialect = "opset18", which writes attention in older operators; if that is refused, '
        "too, take --target cuda or onnxruntime for this model, and report the node",
    )


def _first_error(parser: Any, messages: Messages) -> str:
    return str(parser.get_error(0).desc()) if parser.num_errors else messages.text
