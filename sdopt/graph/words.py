"""Words from outside in a text encoder's graph: ids beyond the vocabulary take their vectors from an input.

The vocabulary's table is not touched, so the graph with words and the one without lie over the same weight file.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdopt.errors import ExportError
from sdopt.graph.sites import find_sites
from sdopt.model.slots import WORDS_INPUT, WordSlot

_IDS = "input_ids"


def add_words(model: ir.Model) -> WordSlot:
    """Give a text encoder the input `WORDS_INPUT`, [vectors, width] of the outputs' type, in place.

    An id at or above the vocabulary's size is a row of it, counted from there. Whatever else looks at ids, as the
    search for the end of the text does, sees 0 in its place: the highest id would otherwise be taken for the end.
    Raises `ExportError` where the graph has no one table of tokens.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == _IDS)
    tables = [site for site in find_sites(graph) if site.layer.name.rpartition(".")[2] == "token_embedding"]
    if len(tables) != 1 or tables[0].node.op_type != "Gather":
        raise ExportError("the text encoder's graph has no table of tokens, so that no word can be added to it")
    gather = tables[0].node
    vocabulary, width = tables[0].layer.shape
    known = gather.outputs[0]
    users, places = list(known.uses()), list(ids.uses())

    size = _constant(graph, "words_vocabulary", np.array(vocabulary, np.int64))
    zero = _constant(graph, "words_zero", np.array(0, np.int64))
    inside = _node(graph, "Less", [ids, size], "words_inside", ir.DataType.BOOL, ids.shape)
    inner = _node(graph, "Where", [inside, ids, zero], "words_inner_ids", ir.DataType.INT64, ids.shape)
    for user, index in places:
        user.replace_input_with(index, inner)

    dtype = graph.outputs[0].dtype
    assert dtype is not None
    vectors = ir.Value(name=WORDS_INPUT, shape=ir.Shape(("words", width)), type=ir.TensorType(dtype))
    graph.inputs.append(vectors)
    beyond = _node(graph, "Sub", [ids, size], "words_beyond", ir.DataType.INT64, ids.shape)
    rows = _node(graph, "Max", [beyond, zero], "words_rows", ir.DataType.INT64, ids.shape)
    taken = _node(graph, "Gather", [vectors, rows], "words_vectors", dtype, known.shape, axis=0)
    if known.dtype != dtype:
        taken = _node(graph, "Cast", [taken], "words_vectors_cast", known.dtype, known.shape, to=int(known.dtype or 1))
    last = _constant(graph, "words_last_axis", np.array([-1], np.int64))
    mask_shape = None if ids.shape is None else ir.Shape((*ids.shape, 1))
    mask = _node(graph, "Unsqueeze", [inside, last], "words_mask", ir.DataType.BOOL, mask_shape)
    chosen = _node(graph, "Where", [mask, known, taken], "words_embedding", known.dtype, known.shape)
    for user, index in users:
        user.replace_input_with(index, chosen)
    common.TopologicalSortPass()(model)
    return WordSlot(vocabulary=vocabulary, width=width)


def _node(
    graph: ir.Graph, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType | None, shape: ir.Shape | None,
    **attributes: int,
) -> ir.Value:  # fmt: skip
    node = ir.node(op, inputs, attributes, name=f"{name}_{op}")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, shape
    graph.append(node)
    return output


def _constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value
