"""What a build will do before it does it: each step, found or to be made, and what it will cost."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from sdopt.convert.convert import require_apart
from sdopt.convert.finished import find_finished
from sdopt.convert.graphs import find_graph
from sdopt.convert.plan import BuildPlan, ComponentPlan
from sdopt.convert.plans.wanted import generations, peak_bytes
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store, cache_root
from sdopt.model.component import ComponentName

# Rough rates of two cores, to tell seconds from minutes; benchmarks/export_budget.py measures real builds.
_COPY_BYTES_PER_S = 250e6
_TRACE_FIXED_S, _TRACE_S_PER_TENSOR = 2.0, 0.012
_TRACE_BYTES = 600_000_000
_COPY_BYTES = 150_000_000
_PLAN_FIXED_S, _PLAN_BYTES_PER_S = 2.0, 90e6


@dataclass(frozen=True)
class Step:
    """`found` means that nothing is to be done. Disk is what stays, memory the peak of the process that does it."""

    stage: str
    component: str
    key: str
    found: bool
    disk_bytes: int
    memory_bytes: int
    expected_s: float
    note: str = ""
    """The component's precision and why, where sdopt chose it."""


def list_steps(plan: BuildPlan, output: Path, *, read_all: bool = False) -> list[Step]:
    """The steps of `convert(plan, output)` in order. Reads the store and what is at `output`, writes nothing."""
    output = Path(os.path.abspath(output))
    require_apart(plan, output)
    store = Store(cache_root())
    steps = _list_steps(plan, output, store)
    if find_finished(plan, output, store, read_all=read_all) is None:
        return steps
    return [dataclasses.replace(step, found=True, expected_s=0.0) for step in steps]


def _list_steps(plan: BuildPlan, output: Path, store: Store) -> list[Step]:
    steps: list[Step] = []
    for name, part in plan.components.items():
        steps.append(_weights_step(name, part, output))
        steps.append(_graph_step(name, part, store))
    steps += _plan_steps(plan)
    if plan.recipe.verify.enabled:
        for name, part in plan.components.items():
            # fp32 weights on both sides, one process after the other.
            memory = _fp32_bytes(part) * 2
            steps.append(
                Step("parity", name, part.architecture, False, 0, memory, _fp32_bytes(part) / _COPY_BYTES_PER_S)
            )
        everything = sum(_fp32_bytes(part) for part in plan.components.values())
        pictures = plan.recipe.verify.steps * 2 * 3
        steps.append(
            Step("fidelity", "pipeline", "", False, 0, everything * 2, everything / _COPY_BYTES_PER_S * pictures / 10)
        )
    return steps


def _weights_step(name: ComponentName, part: ComponentPlan, output: Path) -> Step:
    found = Staging.peek_weights(output, name, part.weights_key)
    seconds = 0.0 if found else part.weights_bytes / _COPY_BYTES_PER_S
    return Step("weights", name, part.weights_key, found, part.weights_bytes, _COPY_BYTES, seconds)


def _graph_step(name: ComponentName, part: ComponentPlan, store: Store) -> Step:
    found = find_graph(store, part.architecture) is not None
    seconds = 0.0 if found else _TRACE_FIXED_S + _TRACE_S_PER_TENSOR * len(part.tensors)
    note = f"{part.precision}, {part.precision_reason}" if part.precision_reason else ""
    return Step("graph", name, part.architecture, found, len(part.tensors) * 1000, _TRACE_BYTES, seconds, note)


def _plan_steps(plan: BuildPlan) -> list[Step]:
    """One for each plan. Whether the store has it is known only with the digest of its weights."""
    per_component = len(plan.profiles) * len(generations(plan))
    steps: list[Step] = []
    for name, part in plan.components.items():
        memory = peak_bytes(part.weights_bytes)
        seconds = _PLAN_FIXED_S + part.weights_bytes / _PLAN_BYTES_PER_S
        step = Step("plan", name, part.architecture, False, part.weights_bytes, memory, seconds)
        steps += [step] * per_component
    return steps


def _fp32_bytes(part: ComponentPlan) -> int:
    count = 0
    for ref in part.tensors.values():
        count += ref.nbytes // ref.dtype.itemsize_bytes
    return count * 4
