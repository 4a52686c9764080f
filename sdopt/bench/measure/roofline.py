"""How much arithmetic a network is, and how much this machine does at most: both in the run that they are quoted in.

FLOPs are 2 x multiply-accumulates of convolutions, matrix products and attention, counted by torch on shapes alone. The
roof is the product of two square matrices and a copy, on the device of the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import progress
from sdopt.backends.protocol import ComponentFiles
from sdopt.bench.case.report import RooflineRecord
from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import SdoptError
from sdopt.fidelity.candidate import engines_use_gpu
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.processes.call import How, call
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    import torch

# Sides grow until a product takes so long: then what a call costs by itself, and the caches, no longer tell.
_LONG_ENOUGH_NS = 100_000_000
_LEAST_SIDE, _MOST_SIDE = 256, 16384
_PRODUCTS, _COPIES = 3, 5
# Larger than the last cache of nearly all processors and GPUs; a quarter of the free memory at most.
_COPY_BYTES = 512 << 20
_ON_CPU = (Precision.FP32, Precision.BF16, Precision.INT8)
_ON_GPU = (Precision.FP32, Precision.BF16, Precision.FP16, Precision.INT8)


@dataclass(frozen=True)
class Roof:
    """What the machine reaches and what the networks ask of it; `notes` say why, where that is not known."""

    roofline: tuple[RooflineRecord, ...] = ()
    flops: dict[ComponentName, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_roof(folder: Path, manifest: BundleManifest, timeout_s: float) -> Roof:
    """Measure in a fresh process, on the device of the bundle's engines. A failure is a note: it takes nothing from
    what the candidates were measured at.
    """
    device = "cuda" if engines_use_gpu(manifest) else "cpu"
    arguments: JsonTable = {"folder": str(folder), "manifest": manifest.model_dump_json(), "device": device}
    try:
        value = call(measure_roofline, arguments, how=How.FRESH, timeout_s=timeout_s).value
    except SdoptError as error:
        return Roof(notes=(f"the roofline was not measured: {error.message}",))
    flops = {ComponentName(name): int(count) for name, count in value["flops"].items()}
    return Roof(tuple(RooflineRecord.model_validate(record) for record in value["roofline"]), flops)


def measure_roofline(arguments: JsonTable) -> JsonTable:
    """Entry of a child: `flops` of each component of the bundle, and `roofline`, as the report takes both."""
    from sdopt.backends.component_files import component_files

    folder, manifest = Path(arguments["folder"]), BundleManifest.model_validate_json(arguments["manifest"])
    progress.update("measuring what the machine can do", 0.0)
    names: list[ComponentName] = list(manifest.components)
    return {
        "roofline": [record.model_dump(mode="json") for record in measure_roof(str(arguments["device"]))],
        "flops": {name: count_flops(component_files(folder, manifest, name)) for name in names},
    }


def count_flops(files: ComponentFiles) -> int:
    """FLOPs of one run of a component at its usual shapes. Nothing is computed and no weight is read."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdopt.networks.modules import build_network
    from sdopt.weights.to_torch import TORCH_DTYPES

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build_network(files.name, files.config)
        # fp32 throughout: the network is built in it, and the count does not depend on the type.
        dtypes = [torch.float32 if t.dtype.is_float else TORCH_DTYPES[t.dtype] for t in files.spec.inputs]
        shapes = [tensor.shape(files.extents) for tensor in files.spec.inputs]
        network(*(torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
    return int(counter.get_total_flops())


def measure_roof(device: str) -> tuple[RooflineRecord, ...]:
    """A record for each precision whose product torch has on `device`, `cpu` or `cuda`."""
    copy_bytes_per_s = measure_copy(device)
    reached = {
        precision: measure_product(device, precision) for precision in (_ON_GPU if device == "cuda" else _ON_CPU)
    }
    return tuple(
        RooflineRecord(device=device, precision=precision, flops_per_s=flops_per_s, copy_bytes_per_s=copy_bytes_per_s)
        for precision, flops_per_s in reached.items()
        if flops_per_s is not None
    )


def measure_product(device: str, precision: Precision) -> float | None:
    """Operations per second of the best of several products; None where torch has none in this precision here."""
    side, taken_ns = _LEAST_SIDE, 0
    try:
        multiply = _make_product(device, precision, side)
        multiply()
        while (taken_ns := _time(multiply, device)) < _LONG_ENOUGH_NS and side < _MOST_SIDE:
            side *= 2
            multiply = _make_product(device, precision, side)
    except (RuntimeError, NotImplementedError) as error:
        # Products of integers are not in every torch; any other precision's failure is one.
        if precision is not Precision.INT8:
            raise
        progress.update(f"no int8 roof: {error}", 0.5)
        return None
    best_ns = min([taken_ns, *(_time(multiply, device) for _ in range(_PRODUCTS - 1))])
    return 2 * side**3 / (best_ns / 1e9)


def measure_copy(device: str) -> float:
    """Bytes read plus bytes written per second, of the best of several copies."""
    import psutil
    import torch

    free_bytes = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    size_bytes = min(_COPY_BYTES, int(free_bytes) // 8)
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_ns = min(_time(lambda: target.copy_(source), device) for _ in range(_COPIES))
    return 2 * size_bytes / (best_ns / 1e9)


def _make_product(device: str, precision: Precision, side: int) -> Callable[[], Any]:
    import torch

    if precision is Precision.INT8:
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        # cuBLASLt is fast where the second matrix lies by columns.
        b = b.t() if device == "cuda" else b
        return lambda: torch._int_mm(a, b)
    x, y = (torch.randn(side, side, device=device).to(_dtype(precision)) for _ in range(2))
    return lambda: x @ y


def _dtype(precision: Precision) -> torch.dtype:
    from sdopt.weights.to_torch import TORCH_DTYPES

    return TORCH_DTYPES[DType(precision)]


def _time(run: Callable[[], Any], device: str) -> int:
    """Wall time in ns, until the device is done; at least 1."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start_ns = time.perf_counter_ns()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return max(1, time.perf_counter_ns() - start_ns)
