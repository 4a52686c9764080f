"""One TensorRT plan, built and audited in this process: the entry of a child of `sdopt.convert.plans.ladder`."""

from __future__ import annotations

import mmap
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from sdopt.bundle.records import PlanAudit
from sdopt.disk.files import disk_errors, write_file
from sdopt.errors import AuditError
from sdopt.machine.device_memory import DeviceMemoryPeak, sample_device_memory
from sdopt.machine.gpus import find_gpus
from sdopt.model.component import ComponentName
from sdopt.model.file_names import SLOTS_GRAPH_NAME
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme
from sdopt.processes.channel import JsonTable


@dataclass(frozen=True)
class Rung:
    """One way to build, each taking less memory than the one before: `side_by_side` builds two plans at a time.

    The workspace is memory of the GPU that general TensorRT works in; None leaves the library's own limit.
    """

    name: str
    side_by_side: bool = False
    weight_streaming: bool = False
    workspace_bytes: int | None = None


@dataclass(frozen=True)
class PlanJob:
    """One plan, as it crosses to the child in JSON.

    `profiles` has a table of (min, opt, max) shapes by input for each optimisation profile. `attention_layers` are
    those of torch; `native` says that the graph has one attention node for each of them. `quantized` has the scheme of
    each layer that the graph has quantised, by its name in torch: no other may be.
    """

    kind: Literal["tensorrt-rtx", "tensorrt"]
    component: ComponentName
    precision: Precision
    graph: Path
    weights: Path
    output: Path
    generation: str
    profiles: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], ...]
    attention_layers: int
    native: bool
    require_fused: bool
    rung: Rung
    memory_limit_bytes: int | None
    timing_cache: Path | None
    quantized: dict[str, Scheme] = field(default_factory=dict)


JOB = TypeAdapter(PlanJob)


def build_in_child(arguments: JsonTable) -> JsonTable:
    """Build the plan of a `PlanJob` at its `output`; returns its digest, version, audit, time and peak of the GPU."""
    job = JOB.validate_python(arguments)
    if job.memory_limit_bytes is not None:
        # Of the process's own memory; the mapped weight file, whose pages come and go, is not counted.
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory_limit_bytes, job.memory_limit_bytes))
    started = time.monotonic()
    with disk_errors(job.output), _watch_gpu(job) as peak:
        sha256, audit, version = _build(job)
    return {
        "sha256": sha256, "version": version, "audit": audit.model_dump(mode="json"),
        "build_s": round(time.monotonic() - started, 1), "build_peak_device_bytes": peak.peak_bytes,
    }  # fmt: skip


def _watch_gpu(job: PlanJob) -> AbstractContextManager[DeviceMemoryPeak]:
    """General TensorRT times its kernels on the first GPU. TensorRT-RTX builds ahead of time, without one."""
    gpu = next(iter(find_gpus()), None) if job.kind == "tensorrt" else None
    return nullcontext(DeviceMemoryPeak()) if gpu is None else sample_device_memory(gpu.uuid)


def _is_for_this_gpu(job: PlanJob) -> bool:
    return any(gpu.generation == job.generation for gpu in find_gpus())


def _build(job: PlanJob) -> tuple[str, PlanAudit, str]:
    """Parse, audit the network, build, audit the plan. (SHA-256 of the plan, its audit, the library's version)."""
    from sdopt.backends.tensorrt.builder import BuildOptions, NoFusedKernelError, build_plan
    from sdopt.backends.tensorrt.inspector import inspect_attention
    from sdopt.backends.tensorrt.loading import load_library
    from sdopt.backends.tensorrt.parsed_network import parse_graph
    from sdopt.backends.tensorrt.plan_audit import FUSED_HINT, allow_decomposed_attention, audit_network, judge_plan
    from sdopt.backends.tensorrt.plan_text import count_attention, count_kernels, find_widened, read_kernels
    from sdopt.graph.external_data import check_graph_file
    from sdopt.graph.scalars import lift_scalars

    library = load_library(job.kind)
    second = ", the graph with LoRAs and words" if job.graph.name == SLOTS_GRAPH_NAME else ""
    label = f"building {job.component} for {job.generation}{second}"
    cache = None if job.timing_cache is None else _read_cache(job.timing_cache)
    options = BuildOptions(job.generation, job.profiles, job.rung.weight_streaming, job.rung.workspace_bytes, cache)
    model = check_graph_file(job.graph)
    if job.kind == "tensorrt":
        lift_scalars(model)
    with parse_graph(library, model, job.weights, component=job.component) as parsed:
        try:
            built = build_plan(parsed, options, job.output, label=label)
        except NoFusedKernelError as error:
            if job.require_fused:
                raise AuditError(
                    f"attention in {job.component} cannot be fused: {library.__name__} has no dedicated kernel for the "
                    "head size, the shapes or the precision of some of it",
                    hint=FUSED_HINT,
                ) from error
            allow_decomposed_attention(parsed.network, library)
            built = build_plan(parsed, options, job.output, label=label)
        search = parsed.search
        if 2 * search.found < search.sampled or search.quantized_found < search.quantized_sampled:
            with job.output.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                search.search_everywhere(data)
        network = audit_network(parsed.network, library, job.precision, job.quantized)
        kernels = read_kernels(job.output) if job.kind == "tensorrt-rtx" else ()
        listed = count_attention(kernels)
        inspected = inspect_attention(library, job.output) if listed is None and _is_for_this_gpu(job) else None
        audit = PlanAudit(
            attention_layers=job.attention_layers, attention_native=network.attention_native,
            attention_fused=network.attention_fused if listed is None else listed >= job.attention_layers > 0,
            fused_kernels=inspected if listed is None else listed, compute_layers=network.compute_layers,
            other_precision=network.other_precision, plan_bytes=built.size_bytes, weights_bytes=parsed.weights_bytes,
            zero_share=round(built.zero_share, 6), weights_zero_share=round(parsed.weights_zero_share, 6),
            weights_sampled=search.sampled, weights_found=search.found,
            quantized_layers=len(network.quantized), quantized_sampled=search.quantized_sampled,
            quantized_found=search.quantized_found, kernels=count_kernels(kernels),
            widened_layers=find_widened(kernels, network.quantized),
        )  # fmt: skip
        judge_plan(
            job.kind, job.component, audit, network, job.precision, require_fused=job.require_fused, native=job.native
        )
    if built.timing_cache is not None and job.timing_cache is not None:
        write_file(job.timing_cache, built.timing_cache)
    return built.sha256, audit, str(library.__version__)


def _read_cache(path: Path) -> bytes:
    """The timings of kernels that earlier builds took; empty at first."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return b""
