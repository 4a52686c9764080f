"""Quantised graphs of a component: written beside its weights, as a trial or to be published.

A trial's graph names two files: the 16-bit `weights.safetensors` for what stays, and one with every layer quantised.
What is published has one weight file again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from safetensors import safe_open

from sdopt.disk.digest import FileRecord
from sdopt.disk.files import write_file
from sdopt.graph.qdq import LayerChoice, insert_qdq
from sdopt.graph.sites import WeightedLayer, list_layers, weight_name
from sdopt.model.file_names import GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.precision import DType
from sdopt.processes.call import call
from sdopt.trace.bind import rebind_weights
from sdopt.weights.safetensors_header import TensorRef, read_header
from sdopt.weights.stream import storage_layout, write_weights
from sdopt.weights.tensor_layout import plan_layout

QUANTIZED_NAME = "quantized.safetensors"


@dataclass(frozen=True)
class Stock:
    """A component with all of its layers quantised beside it. `folder` holds its graph and both weight files."""

    folder: Path
    graph_dtype: DType
    choices: Mapping[str, LayerChoice]


def find_layers(folder: Path) -> dict[str, WeightedLayer]:
    """The layers of the graph in `folder` that can be quantised."""
    return list_layers(ir.load(folder / GRAPH_NAME))


@dataclass(frozen=True)
class StockJob:
    """The layers of `choices`, to be quantised from the checkpoint's tensors. `scales` is what calibration found."""

    folder: Path
    graph_dtype: DType
    choices: dict[str, LayerChoice]
    tensors: dict[str, TensorRef]
    scales: Path | None


def stock_layers(job: StockJob) -> Stock:
    """Quantise every layer of the job, in a child: rounding is torch's."""
    call(stock_in_child, job)
    return Stock(job.folder, job.graph_dtype, job.choices)


def stock_in_child(job: StockJob) -> None:
    from sdopt.quantize.rounding import QuantizedLayer, write_quantized

    found = {}
    if job.scales is not None:
        with safe_open(job.scales, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    quantized = {
        name: QuantizedLayer(
            job.tensors[weight_name(name)], choice.scheme,
            float(found[f"{name}.input_amax"]) if choice.scheme.quantizes_activations else None,
            found[f"{name}.smooth"] if choice.smooth else None,
        )
        for name, choice in job.choices.items()
    }  # fmt: skip
    write_quantized(job.folder / QUANTIZED_NAME, quantized, job.graph_dtype)


def write_trial(stock: Stock, layers: Mapping[str, LayerChoice], name: str) -> None:
    """Write the graph in which just these layers are quantised, beside the others under `name`."""
    model = ir.load(stock.folder / GRAPH_NAME)
    insert_qdq(model, layers)
    rebind_weights(model, {**_refs(stock, WEIGHTS_NAME), **_quantized_refs(stock, layers)})
    write_file(stock.folder / name, ir.to_proto(model).SerializeToString(deterministic=True))


def publish_choice(stock: Stock, target: Path, layers: Mapping[str, LayerChoice], label: str) -> FileRecord:
    """Make the folder `target` a component of one graph and one weight file. Returns the record of the latter."""
    model = ir.load(stock.folder / GRAPH_NAME)
    insert_qdq(model, layers)
    places = {**_refs(stock, WEIGHTS_NAME), **_quantized_refs(stock, layers)}
    tensors = {name: places[name] for name in _external_names(model)}
    layout = plan_layout(target / WEIGHTS_NAME, storage_layout(tensors, stock.graph_dtype))
    rebind_weights(model, layout.tensors)
    target.mkdir(parents=True, exist_ok=True)
    written = write_weights(target / WEIGHTS_NAME, tensors, stock.graph_dtype, label=label)
    write_file(target / GRAPH_NAME, ir.to_proto(model).SerializeToString(deterministic=True))
    return FileRecord(sha256=written.sha256, size_bytes=written.size_bytes)


def _refs(stock: Stock, name: str) -> Mapping[str, TensorRef]:
    return read_header(stock.folder / name).tensors


def _quantized_refs(stock: Stock, layers: Mapping[str, LayerChoice]) -> dict[str, TensorRef]:
    return {key: ref for key, ref in _refs(stock, QUANTIZED_NAME).items() if key.rpartition(".")[0] in layers}


def _external_names(model: ir.Model) -> list[str]:
    return [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor)
    ]
