"""Where an engine and torch part: every layer's output in the engine's graph against torch's module of the same name.

torch runs a component in fp32 and its modules' outputs are kept; then it runs in bf16 where the engine computes in 16
bits or fewer, and how far each of its own layers is from fp32 says what rounding explains at that depth. Then the graph
runs on the engine's runtime with these values as further outputs. All take parity's seeded inputs.

What runs is the engine's runtime on the engine's graph, not quite the engine: a value that is an output is written to
memory, so a runtime cannot fuse over it, and OpenVINO in bf16 rounds where the engine itself might keep more digits. A
TensorRT plan gives no values from within: its graph runs on ONNX Runtime, or on OpenVINO where it is typed bf16.

What lies between two layers with weights (activations, sums, upsampling) is blamed on the layer after it.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ComponentRecord
from sdopt.disk.files import disk_errors, require_free_disk
from sdopt.fidelity.candidate import dump_settings, parse_settings
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
    graph_dtype,
)
from sdopt.model.component import ComponentName, TensorSpec
from sdopt.model.file_names import GRAPH_NAME
from sdopt.model.precision import DType, Precision
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    import torch

    from sdopt.backends.protocol import ComponentFiles
    from sdopt.graph.layers import LayerValue

# Outputs that one run of the graph may add: a UNet of SDXL has some 30 GB of them at 1024 px.
_RUN_LIMIT_BYTES = 1 << 30
_WORST = 1e30
_FP32 = 1e-5
# Half a step of the last bit: the most that storing one value rounds.
_HALF_BF16, _HALF_FP16 = 2.0**-9, 2.0**-12


@dataclass(frozen=True)
class LayerDifference:
    """|a-b|/|b| of a layer's output against torch fp32's, and what rounding explains there."""

    layer: str
    relative_error: float
    tolerance: float


@dataclass(frozen=True)
class ComponentLayers:
    """In the order of the graph. `runtime` is what ran it, in words, where that is not the engine's own."""

    layers: tuple[LayerDifference, ...]
    runtime: str = ""


def compare_layers(
    folder: Path, manifest: BundleManifest, name: ComponentName, work: Path, *, timeout_s: float | None = None
) -> ComponentLayers:
    """Compare one component of a bundle, in two child processes; `work` is an existing folder, for gigabytes.

    Raises what the backends raise.
    """
    record = manifest.require_component(name)
    runtime = choose_layer_runtime(record)
    place = work / f"layers-{name}"
    place.mkdir()
    arguments: JsonTable = {
        "folder": str(folder),
        "manifest": manifest.model_dump_json(),
        "name": name.value,
        "work": str(place),
        "runtime": dump_settings(runtime),
        "peer": None if record.precision is Precision.FP32 else Precision.BF16.value,
    }
    try:
        peer = call(record_torch, arguments, timeout_s=timeout_s).value
        errors = call(run_graph, arguments, timeout_s=timeout_s).value
    finally:
        shutil.rmtree(place)
    tolerances = find_tolerances(record, [peer.get(layer) for layer in errors])
    differences = (
        LayerDifference(layer, error, tolerance)
        for (layer, error), tolerance in zip(errors.items(), tolerances, strict=True)
    )
    return ComponentLayers(tuple(differences), "" if runtime == record.backend else runtime.kind)


def choose_layer_runtime(record: ComponentRecord) -> BackendSettings:
    """The engine's own runtime, or for a TensorRT plan one that shows the values within its graph."""
    if not isinstance(record.backend, TensorRTSettings):
        return record.backend
    typed_bf16 = graph_dtype(record.precision, record.backend) is DType.BF16
    return OpenVINOSettings() if typed_bf16 else OnnxRuntimeSettings()


def find_tolerances(record: ComponentRecord, peer: Sequence[float | None]) -> list[float]:
    """What the arithmetic of a component explains at each of its layers, in the order of the graph.

    16 bits: twice what torch in bf16 is off there, of which fp16 with three more bits has an eighth. fp32: roundings
    that add up as a random walk. Quantised components may lose twice what was allowed of their outputs, at any layer.
    `benchmarks/layer_tolerances.py` measures how near to this sound engines come.
    """
    if record.precision is Precision.FP32:
        rounding = [_FP32 * math.sqrt(place + 1) for place in range(len(peer))]
    else:
        share, least = (1 / 8, _HALF_FP16) if record.precision is Precision.FP16 else (1.0, _HALF_BF16)
        rounding = [max(2 * least, 2 * share * (error or 0.0)) for error in peer]
    if record.quantization is not None and record.is_quantized:
        rounding = [max(value, 2 * record.quantization.error_limit) for value in rounding]
    return rounding


def record_torch(arguments: JsonTable) -> JsonTable:
    """Entry of the first child: torch's layers in fp32 to files, and how far torch in the peer's precision is from
    them.
    """
    from sdopt.backends.open import open_session

    files, values = _open_files(arguments), list_values(arguments)
    work = Path(arguments["work"])
    progress.update(f"torch runs {files.name} layer by layer", 0.0)
    with open_session(files, TorchSettings()) as session:
        _run_torch(session, files, values, lambda number, value: _keep(work, number, value))
    gc.collect()
    if arguments["peer"] is None:
        return {}
    errors: dict[str, float] = {}

    def compare(number: int, value: torch.Tensor) -> None:
        errors[values[number].layer] = _measure_error(_find_kept(work, number), value)

    progress.update(f"torch runs {files.name} in {arguments['peer']}", 0.5)
    with open_session(files, TorchSettings(precision=arguments["peer"])) as session:
        _run_torch(session, files, values, compare)
    return dict(errors)


def run_graph(arguments: JsonTable) -> JsonTable:
    """Entry of the second child: the graph with its layers as outputs, as many at a time as memory holds. Returns the
    error of each layer, in the order of the graph.
    """
    from sdopt.backends.open import open_session
    from sdopt.graph.layers import write_with_outputs

    files, values = _open_files(arguments), list_values(arguments)
    settings = parse_settings(arguments["runtime"])
    assert settings is not None
    work = Path(arguments["work"])
    _copy_weights(files.weights, work / files.weights.name)
    shapes = {number: tuple(_find_kept(work, number).shape) for number in range(len(values)) if _is_kept(work, number)}
    errors: dict[str, float] = {}
    for numbers in split_runs(shapes, _RUN_LIMIT_BYTES):
        progress.update(f"{settings.kind} runs {files.name} layer by layer", len(errors) / len(values))
        write_with_outputs(files.graph, [values[number] for number in numbers], work / files.graph_name)
        added = {
            values[number].value: TensorSpec(values[number].value, values[number].dtype, shapes[number])
            for number in numbers
        }
        known = {tensor.name for tensor in files.spec.outputs}
        outputs = (*files.spec.outputs, *(spec for name, spec in added.items() if name not in known))
        opened = replace(files, folder=work, spec=replace(files.spec, outputs=outputs))
        with open_session(opened, settings) as session:
            results = session.run(_make_inputs(files))
        for number in numbers:
            errors[values[number].layer] = _measure_error(_find_kept(work, number), results[values[number].value])
    return dict(errors)


def split_runs(shapes: Mapping[int, tuple[int, ...]], limit_bytes: int) -> Iterator[list[int]]:
    """Layers by number, in runs whose outputs in fp32 stay under the limit; one that is larger has a run of its own."""
    run: list[int] = []
    total_bytes = 0
    for number, shape in shapes.items():
        size_bytes = 4 * math.prod(shape)
        if run and total_bytes + size_bytes > limit_bytes:
            yield run
            run, total_bytes = [], 0
        run.append(number)
        total_bytes += size_bytes
    if run:
        yield run


def list_values(arguments: JsonTable) -> list[LayerValue]:
    from sdopt.graph.layers import list_layer_values

    return list_layer_values(Path(arguments["folder"]) / arguments["name"] / GRAPH_NAME)


def _open_files(arguments: JsonTable) -> ComponentFiles:
    from sdopt.backends.component_files import component_files
    from sdopt.fidelity.origin import find_origin

    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    name = ComponentName(arguments["name"])
    return component_files(Path(arguments["folder"]), manifest, name, (), find_origin(manifest).get(name))


def _make_inputs(files: ComponentFiles) -> dict[str, torch.Tensor]:
    from sdopt.trace.seeded_inputs import make_inputs

    return make_inputs(files.spec, files.config, files.extents)


def _run_torch(session: Any, files: ComponentFiles, values: Sequence[LayerValue], take: Any) -> None:
    """Run torch once; `take` gets the number and the output of each layer as it is computed."""
    with _watch_layers(session.engine, values, take):
        session.run(_make_inputs(files))


@contextmanager
def _watch_layers(network: torch.nn.Module, values: Sequence[LayerValue], take: Any) -> Iterator[None]:
    modules = {name.removeprefix("network."): module for name, module in network.named_modules()}
    handles = []
    for number, value in enumerate(values):
        if value.before:

            def before(_: Any, given: tuple[Any, ...], number: int = number) -> None:
                take(number, given[0])

            handles.append(modules[value.before].register_forward_pre_hook(before))
        else:

            def after(_: Any, __: Any, given: Any, number: int = number) -> None:
                take(number, given)

            handles.append(modules[value.layer].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(work: Path, number: int, value: torch.Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"value": value.contiguous()}, work / f"{number}.safetensors")


def _is_kept(work: Path, number: int) -> bool:
    return (work / f"{number}.safetensors").is_file()


def _find_kept(work: Path, number: int) -> torch.Tensor:
    from safetensors.torch import load_file

    value: torch.Tensor = load_file(work / f"{number}.safetensors")["value"]
    return value


def _measure_error(expected: torch.Tensor, value: torch.Tensor) -> float:
    """|a-b|/|b|, of the elements in their order, whatever the shape: a graph may view them otherwise."""
    actual = value.double().cpu().flatten()
    if actual.numel() != expected.numel() or not bool(actual.isfinite().all()):
        return _WORST
    flat = expected.double().flatten()
    norm, distance = flat.norm().item(), (actual - flat).norm().item()
    return float(distance / norm) if norm else (0.0 if not distance else _WORST)


def _copy_weights(weights: Path, target: Path) -> None:
    """The weights beside a copy of their graph, as a file of their own: runtimes refuse links, for good reasons."""
    require_free_disk(target.parent, weights.stat().st_size)
    with disk_errors(target):
        shutil.copyfile(weights, target)
