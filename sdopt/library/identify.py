"""`sdopt inspect`: what is this? A bundle, an ONNX graph, a plan, an adapter or a checkpoint, as a JSON-able table."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from sdopt.adapters.adapter_file import is_adapter, read_adapter_file
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import read_manifest
from sdopt.bundle.plan_header import read_plan_header
from sdopt.checkpoint.source import open_checkpoint
from sdopt.disk.files import hash_file
from sdopt.errors import CheckpointError, UsageError
from sdopt.graph.external_data import check_graph_file
from sdopt.library.adapter_fit import describe_fit
from sdopt.model.component import ComponentName, native_size_px
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.pipeline.word_files import is_word_file, read_word_shapes
from sdopt.weights.safetensors_header import TensorRef


def inspect_source(source: str, *, bundle: str | None = None) -> dict[str, Any]:
    """`kind` is bundle, onnx, plan, adapter, embedding (a textual inversion) or checkpoint; the rest depends on it: a
    bundle's manifest, whose own kind is under `bundle_kind`. With a `bundle`, an adapter's table says under `fit`
    whether that takes it. Raises `CheckpointError` for other things, and `UsageError` where a bundle is given for
    something that is not an adapter.
    """
    if not source:
        raise CheckpointError("SOURCE is empty", hint="give a file, a folder or a Hugging Face id")
    path = Path(source).expanduser()
    if is_adapter(path):
        return _inspect_adapter(path, bundle)
    if bundle is None and is_word_file(path):
        return _inspect_word(path)
    if bundle is not None:
        raise UsageError(
            f"{source} is not an adapter, and --for asks whether a bundle takes one",
            hint=f"sdopt inspect {shlex.quote(source)}",
        )
    if (path / MANIFEST_NAME).is_file():
        table = read_manifest(open_links(path)).model_dump(mode="json")
        return {**table, "kind": "bundle", "bundle_kind": table["kind"]}
    if path.suffix == ".onnx" and path.is_file():
        return _inspect_graph(path)
    if path.suffix in (".plan", ".engine", ".trt") and path.is_file():
        return _inspect_plan(path)
    return _inspect_checkpoint(source)


def _inspect_adapter(path: Path, bundle: str | None) -> dict[str, Any]:
    file = read_adapter_file(path)
    said = {"writer": file.writer, "title": file.title, "alias": file.alias, "base_model": file.base_model}
    table = {
        "kind": "adapter", "adapter_kind": file.kind, "family": file.family, **said, "few_step": file.few_step,
        "rank_least": file.ranks[0], "rank_most": file.ranks[1], "network_alpha": file.network_alpha,
        "layers": {str(name): many for name, many in file.layer_counts.items()},
        "trigger_words": list(file.trigger_words), "tags": dict(file.tags), "embeddings": list(file.embeddings),
        "bytes": file.size_bytes, "sha256": hash_file(file.path),
    }  # fmt: skip
    return table if bundle is None else table | {"fit": describe_fit(file, Path(bundle).expanduser())}


def _inspect_word(path: Path) -> dict[str, Any]:
    shapes = read_word_shapes(path)
    return {
        "kind": "embedding", "writer": shapes.writer, "family": shapes.family, "token": shapes.token,
        "word": shapes.token or path.stem, "vectors": shapes.vectors, "widths": dict(shapes.widths),
        "bytes": path.stat().st_size, "sha256": hash_file(path),
    }  # fmt: skip


def _inspect_plan(path: Path) -> dict[str, Any]:
    """From its first bytes; no TensorRT is imported. What the header does not say is left out."""
    header = read_plan_header(path)
    table: dict[str, Any] = {"kind": "plan", "bytes": path.stat().st_size, "sha256": hash_file(path)}
    if header is None:
        return table | {"flavour": "unknown: its header has none of the layouts that sdopt knows"}
    known = {key: value for key, value in dataclasses.asdict(header).items() if value not in ("", None)}
    written_bytes = known.pop("size_bytes", table["bytes"])
    if written_bytes != table["bytes"]:
        known["damage"] = f"its own header says {written_bytes} bytes"
    return table | known


def _inspect_graph(path: Path) -> dict[str, Any]:
    model = check_graph_file(path)
    graph = model.graph
    files = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}

    def shapes(values: Any) -> dict[str, list[int | str]]:
        return {
            value.name: [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
            for value in values
        }

    return {
        "kind": "onnx",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": shapes(graph.input),
        "outputs": shapes(graph.output),
        "nodes": dict(Counter(node.op_type for node in graph.node).most_common()),
        "external_data": sorted(files),
    }


def _inspect_checkpoint(source: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(source)

    def summary(tensors: dict[str, TensorRef]) -> dict[str, Any]:
        return {
            "tensors": len(tensors),
            "parameters": sum(ref.nbytes // ref.dtype.itemsize_bytes for ref in tensors.values()),
            "dtypes": sorted({str(ref.dtype) for ref in tensors.values()}),
            "bytes": sum(ref.nbytes for ref in tensors.values()),
        }

    sizes: dict[str, Any] = {}
    if ComponentName.VAE_DECODER in checkpoint.components:
        factor = checkpoint.pixels_per_latent
        width_px, height_px = native_size_px(checkpoint.unet.config, factor, checkpoint.family)
        sizes = {
            "width_px": width_px,
            "height_px": height_px,
            "multiple_px": checkpoint.multiple_px,
            "pixels_per_latent": factor,
            "latent_channels": checkpoint.vae_decoder.config["latent_channels"],
        }
    return {
        "kind": "checkpoint",
        "family": checkpoint.family,
        "prediction": checkpoint.prediction,
        "tasks": list(checkpoint.tasks),
        "source": checkpoint.source.model_dump(mode="json"),
        "scheduler": checkpoint.scheduler.get("_class_name"),
        **sizes,
        "components": {name: summary(dict(part.tensors)) for name, part in checkpoint.components.items()},
        "ignored": dict(checkpoint.ignored),
    }
