"""The first stage: the weights are copied while the graphs are traced."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sdopt.bundle.records import GraphAudit
from sdopt.convert.build import Build, Stage, Step
from sdopt.convert.cost import COPY_BYTES_PER_S
from sdopt.convert.graphs import find_graph, trace_missing
from sdopt.disk.digest import FileRecord
from sdopt.disk.staging import Staging
from sdopt.errors import ExportError
from sdopt.model.component import ComponentName
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.processes.nursery import current_nursery, submit_in_context
from sdopt.weights.stream import write_weights

_TRACE_FIXED_S, _TRACE_S_PER_TENSOR = 2.0, 0.012
_TRACE_BYTES = 600_000_000
_COPY_BYTES = 150_000_000


def _estimate(build: Build) -> Iterator[Step]:
    for name, part in build.plan.components.items():
        found = Staging.peek_weights(build.output, name, part.weights_key)
        seconds = 0.0 if found else part.weights_bytes / COPY_BYTES_PER_S
        yield Step("weights", name, part.weights_key, found, part.weights_bytes, _COPY_BYTES, seconds)
        found = find_graph(build.store, part.architecture) is not None
        seconds = 0.0 if found else _TRACE_FIXED_S + _TRACE_S_PER_TENSOR * len(part.tensors)
        note = f"{part.precision}, {part.precision_reason}" if part.precision_reason else ""
        # Tracing has shapes and no data: neither grows with the picture.
        yield Step("graph", name, part.architecture, found, len(part.tensors) * 1000, _TRACE_BYTES, seconds, note)


def _run(build: Build) -> None:
    """Trace in a child while this process copies the weights: one is bound by the processor, the other by the disk."""
    with ThreadPoolExecutor(1) as background:
        tracing = submit_in_context(background, trace_missing, build.plan, build.store, build.cache)
        # Inside: the pool waits for its thread when it is left, and the thread waits for the child.
        with _children_ended_on_error():
            build.weights = {name: _make_weights(build, name) for name in build.plan.components}
            tracing.result()
    build.graphs = {name: _require_graph(build, name) for name in build.plan.components}


@contextmanager
def _children_ended_on_error() -> Iterator[None]:
    """Ctrl-C or a failure must not wait for a child that traces on for a minute."""
    try:
        yield
    except BaseException:
        current_nursery().kill()
        raise


def _make_weights(build: Build, name: ComponentName) -> FileRecord:
    part, staging = build.plan.components[name], build.staging
    if (record := staging.find_weights(name, part.weights_key)) is not None:
        return record
    (staging.folder / name).mkdir(exist_ok=True)
    path = staging.folder / name / WEIGHTS_NAME
    written = write_weights(path, part.tensors, part.graph_dtype, label=f"copying the weights of {name}")
    record = FileRecord(sha256=written.sha256, size_bytes=written.size_bytes)
    staging.note_weights(name, part.weights_key, record)
    return record


def _require_graph(build: Build, name: ComponentName) -> tuple[Path, GraphAudit]:
    found = find_graph(build.store, build.plan.components[name].architecture)
    if found is None:
        raise ExportError(f"the graph of {name} vanished from the store while it was used")
    return found


WEIGHTS_AND_GRAPHS = Stage("weights and graphs", _estimate, _run)
