"""The graph stage: trace what the store does not have, in one child process for all components."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.bundle.records import GraphAudit
from sdopt.convert.plan import BuildPlan
from sdopt.disk.store import Store
from sdopt.model.component import ComponentName, ComponentSpec
from sdopt.model.file_names import GRAPH_NAME
from sdopt.model.precision import DType
from sdopt.model.recipe import Dialect
from sdopt.model.shape import Extent
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable
from sdopt.processes.nursery import current_nursery, submit_in_context
from sdopt.weights.stream import storage_layout

STAGE = "graph"
_AUDIT_NAME = "audit.json"


@dataclass(frozen=True)
class TraceJob:
    """What the child needs to trace one component, as it crosses to it in JSON."""

    key: str
    spec: ComponentSpec
    config: dict[str, Any]
    extents: dict[str, Extent]
    layout: dict[str, tuple[DType, tuple[int, ...]]]
    graph_dtype: DType
    dialect: Dialect
    dynamic: bool


_JOBS = TypeAdapter(list[TraceJob])


def find_graph(store: Store, key: str) -> tuple[Path, GraphAudit] | None:
    """The graph file and its audit, where the store has them."""
    folder = store.find(STAGE, key)
    if folder is None:
        return None
    return folder / GRAPH_NAME, GraphAudit.model_validate_json((folder / _AUDIT_NAME).read_bytes())


def trace_missing(plan: BuildPlan, store: Store, cache: Path) -> int | None:
    """Trace what the store has no graph of. Returns the children's peak memory in bytes; None where all was there."""
    missing = [name for name, part in plan.components.items() if find_graph(store, part.architecture) is None]
    if not missing:
        return None
    # Tracing takes one core, and the UNet about as long as all others together.
    shares = [[name for name in missing if (name is ComponentName.UNET) is alone] for alone in (True, False)]
    with ThreadPoolExecutor(len(shares)) as pool:
        tracing = [submit_in_context(pool, _trace_share, plan, names, cache) for names in shares if names]
        try:
            return sum(future.result() for future in tracing)
        except BaseException:
            current_nursery().kill()  # the pool waits for its threads, and they for their children
            raise


def _trace_share(plan: BuildPlan, names: Sequence[ComponentName], cache: Path) -> int:
    jobs = [_describe_job(plan, name) for name in names]
    arguments = {"cache": str(cache), "jobs": _JOBS.dump_python(jobs, mode="json")}
    return call(trace_in_child, arguments).peak_rss_bytes


def _describe_job(plan: BuildPlan, name: ComponentName) -> TraceJob:
    part = plan.components[name]
    layout = storage_layout(part.tensors, part.graph_dtype)
    return TraceJob(
        part.architecture, part.spec, dict(part.config), dict(plan.extents), layout, part.graph_dtype,
        plan.recipe.dialect, plan.is_dynamic(name),
    )  # fmt: skip


def trace_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: trace, run the passes, bind the weights, put the graph into the store."""
    jobs = _JOBS.validate_python(arguments["jobs"])
    store = Store(Path(arguments["cache"]))
    for done, job in enumerate(jobs):
        progress.update(f"tracing {job.spec.name}", done / len(jobs))
        graph, audit = _trace(job)
        store.put(STAGE, job.key, {GRAPH_NAME: graph, _AUDIT_NAME: json.dumps(audit.model_dump(mode="json")).encode()})
    return {}


def _trace(job: TraceJob) -> tuple[bytes, GraphAudit]:
    import onnx_ir as ir

    from sdopt.graph.audit import audit_graph, require_fused_attention
    from sdopt.graph.passes import run_passes
    from sdopt.trace.bind import bind_weights
    from sdopt.trace.trace import trace_component

    traced = trace_component(
        job.spec, job.config, job.extents, dtype=job.graph_dtype, dialect=job.dialect, dynamic=job.dynamic
    )
    run_passes(traced.model)
    bind_weights(traced.model, job.layout, job.graph_dtype)
    audit = audit_graph(traced.model, traced.attention_layers)
    require_fused_attention(job.spec.name, audit)
    return ir.to_proto(traced.model).SerializeToString(deterministic=True), audit
