"""`sdopt adapter export`: a LoRA for programs that run a bundle's graphs with plain ONNX Runtime.

ONNX Runtime loads an adapter by itself (`LoraAdapter`, `RunOptions.add_active_adapter`) into inputs of the graph that
have a default. The graphs of a bundle have none, for OpenVINO takes an input with a default as a constant: the export
holds copies of them with slots of zeros, over the bundle's own weight files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from sdopt.adapters.adapter_file import read_adapter_file
from sdopt.adapters.match_layers import shapes_of_layers
from sdopt.adapters.resolve import resolve_adapter
from sdopt.backends.slot_layout import name_inputs
from sdopt.bundle.again import variant_command
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import SlotsRecord
from sdopt.disk.files import write_file
from sdopt.errors import UsageError
from sdopt.export.published_folder import open_bundle, staged
from sdopt.model.component import ComponentName
from sdopt.model.file_names import SLOTS_GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.slots import WORDS_INPUT, input_names, slot_shapes
from sdopt.weights.dtypes import numpy_dtype
from sdopt.weights.safetensors_header import read_header

_SUFFIX = ".onnx_adapter"
# Of a slot without an adapter: ONNX Runtime 1.31 computes convolutions of 0 rows wrongly.
_LEAST_RANK = 1
# A copy of the graph, and the slots' zeros.
_ROOM_BYTES = 50_000_000


@dataclass(frozen=True)
class OnnxAdapterExport:
    """`adapters` and `graphs` are the files by component, relative to `folder`. `weights` are the folders whose weight
    files the graphs read.
    """

    folder: Path
    adapters: dict[ComponentName, str]
    graphs: dict[ComponentName, str]
    weights: dict[ComponentName, Path]


def export_onnx_adapter(
    path: Path, bundle: Path, output: Path, *, weight: float, error_limit: float
) -> OnnxAdapterExport:
    """Write `output`, whole or not at all: for each network that the adapter changes, a graph and an adapter file, in
    which `weight` is multiplied in.

    Raises `AdapterError` for a file that the bundle does not take, and `UsageError` for a bundle without slots.
    """
    manifest = open_bundle(bundle)
    slots = _find_slots(bundle, manifest)
    file = read_adapter_file(path)
    base = {
        name: read_header(bundle / name / WEIGHTS_NAME).tensors
        for name in manifest.components if name.takes_adapters
    }  # fmt: skip
    layers = {name: shapes_of_layers(tensors) for name, tensors in base.items()}
    for name, record in slots.items():
        layers[name] |= {slot.layer: slot.shape for slot in record.slots}
    adapter = resolve_adapter(
        file, layers, slots={name: {slot.layer for slot in record.slots} for name, record in slots.items()},
        rank_limit=min(record.rank for record in slots.values()), error_limit=error_limit, base=base,
    )  # fmt: skip
    done = OnnxAdapterExport(output, {}, {}, {})
    with staged(output, "onnx-adapter", manifest, path.stat().st_size + _ROOM_BYTES) as growing:
        for name, pairs in adapter.layers.items():
            dtype = numpy_dtype(manifest.components[name].spec.outputs[0].dtype)
            pairs_by_layer = {
                layer: (torch.from_numpy(pair.down), torch.from_numpy(pair.up * np.float32(weight)))
                for layer, pair in pairs.items()
            }
            named = name_inputs({slot.layer: slot for slot in slots[name].slots}, pairs_by_layer)
            values = {key: np.ascontiguousarray(value.numpy().astype(dtype)) for key, value in named.items()}
            done.adapters[name], done.graphs[name] = f"{name}{_SUFFIX}", f"{name}.onnx"
            done.weights[name] = (bundle / name).absolute()
            _write_adapter(growing / done.adapters[name], values)
            write_file(growing / done.graphs[name], _add_defaults(bundle / name, slots[name], dtype))
    return done


def _find_slots(bundle: Path, manifest: BundleManifest) -> dict[ComponentName, SlotsRecord]:
    slots = {name: record.lora_slots for name, record in manifest.components.items() if record.lora_slots is not None}
    if not slots:
        raise UsageError(
            f"{bundle.name} has no LoRA slots, so that its graphs cannot take an adapter",
            hint=f"build it with slots: {variant_command('--lora-slots 64', bundle)}",
        )
    return slots


def _write_adapter(path: Path, values: dict[str, np.ndarray]) -> None:
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in values.items()})
    made.export_adapter(str(path))


def _add_defaults(folder: Path, slots: SlotsRecord, dtype: np.dtype) -> bytes:
    model = onnx.load(str(folder / SLOTS_GRAPH_NAME), load_external_data=False)
    if slots.words is not None:
        # No id of a plain tokenizer is looked up there.
        words = np.zeros((1, slots.words.width), dtype)
        model.graph.initializer.append(numpy_helper.from_array(words, WORDS_INPUT))
    for slot in slots.slots:
        shapes = slot_shapes(slot.shape, _LEAST_RANK)
        for name, shape in zip(input_names(slot.layer), shapes, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), name))
    serialized: bytes = model.SerializeToString()
    return serialized
