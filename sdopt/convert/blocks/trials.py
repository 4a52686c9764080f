"""Measure a component with some of its groups quantised: its error on held-out inputs, and its speed by turns with the
16-bit engine. In a child process, which keeps each measurement in the store as soon as it has it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from sdopt import progress
from sdopt.bundle.records import SpeedupRecord
from sdopt.convert.blocks.recording import Call, read_calls
from sdopt.convert.blocks.turns import compare_pairs, take_turns
from sdopt.convert.blocks.write import Stock, write_trial
from sdopt.disk.shelf import Shelf
from sdopt.disk.store import Store
from sdopt.graph.qdq import LayerChoice
from sdopt.model.backend_settings import BackendSettings
from sdopt.model.component import ComponentSpec
from sdopt.model.family import Family
from sdopt.model.shape import Extent
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    from torch import Tensor

    from sdopt.backends.protocol import ComponentFiles, Session

# Raise it when what is measured changes: nothing of before is used again.
FORMAT = 2
_TRIAL_NAME = "trial.onnx"
# JSON knows no infinity; this is above any limit.
_WORST = 1e30


class TrialRecord(BaseModel):
    """What one trial gave. `base_error` and `base_ns` are those of the 16-bit engine in the same process."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    error: float
    base_error: float
    base_ns: list[int]
    trial_ns: list[int]
    integer_layers: int | None

    @property
    def speedup(self) -> SpeedupRecord | None:
        return compare_pairs(self.base_ns, self.trial_ns) if self.base_ns else None

    @property
    def base_run_ns(self) -> float:
        return statistics.median(self.base_ns) if self.base_ns else 0.0

    @property
    def slower_ns(self) -> float:
        """What the trial takes longer than the 16-bit engine."""
        return statistics.median(self.trial_ns) - self.base_run_ns if self.trial_ns else 0.0


SHELF = Shelf("block", TrialRecord, "measured.json")


@dataclass(frozen=True)
class Trial:
    """The layers to quantise, and the store's key for what is measured."""

    key: str
    label: str
    layers: dict[str, LayerChoice]


@dataclass(frozen=True)
class TrialJob:
    """Trials of one component, as they cross to the child in JSON.

    `timed` is False where `runtime` stands in for an engine that does not run here, or where speed does not matter.
    """

    stock: Stock
    spec: ComponentSpec
    config: dict[str, Any]
    family: Family
    extents: dict[str, Extent]
    runtime: BackendSettings
    timed: bool
    held_out: list[Path]
    trials: list[Trial]
    cache: Path


_JOB = TypeAdapter(TrialJob)


def run_trials(job: TrialJob) -> dict[str, TrialRecord]:
    """A record for each trial, by its key, from the store or measured."""
    store = Store(job.cache)
    missing = [trial for trial in job.trials if SHELF.find(store, trial.key) is None]
    if missing:
        arguments = _JOB.dump_python(dataclasses.replace(job, trials=missing), mode="json")
        call(measure_in_child, arguments)
    return {trial.key: SHELF.get(store, trial.key) for trial in job.trials}


def measure_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: open the 16-bit engine once, and each trial's beside it."""
    from sdopt.backends.open import open_session
    from sdopt.backends.protocol import ComponentFiles

    job = _JOB.validate_python(arguments)
    store = Store(job.cache)
    files = ComponentFiles(job.stock.folder, job.spec, job.config, job.family, job.extents)
    calls = [call for file in job.held_out for call in read_calls(file, job.spec.name)]
    progress.update(f"opening {job.spec.name}", 0.0)
    with open_session(files, job.runtime) as base:
        base_error = measure_error(base, calls)
        for done, trial in enumerate(job.trials):
            progress.update(f"trying {job.spec.name}: {trial.label}", done / len(job.trials))
            write_trial(job.stock, trial.layers, _TRIAL_NAME)
            record = _measure(job, base, base_error, dataclasses.replace(files, graph_name=_TRIAL_NAME), calls)
            SHELF.put(store, trial.key, record)
    return {}


def _measure(
    job: TrialJob, base: Session, base_error: float, files: ComponentFiles, calls: Sequence[Call]
) -> TrialRecord:
    from sdopt.backends.open import open_session
    from sdopt.backends.protocol import ShowsKernels

    base_ns: list[int] = []
    trial_ns: list[int] = []
    with open_session(files, job.runtime) as session:
        error = measure_error(session, calls)
        if job.timed:
            inputs = _in_types(job.spec, calls[0].inputs)
            base_ns, trial_ns = take_turns(lambda: base.run(inputs), lambda: session.run(inputs))
        integer_layers = session.integer_layers() if isinstance(session, ShowsKernels) else None
    return TrialRecord(
        error=error, base_error=base_error, base_ns=base_ns, trial_ns=trial_ns, integer_layers=integer_layers
    )


def measure_error(session: Session, calls: Sequence[Call]) -> float:
    """|a-b|/|b| over all calls, of the output that is farthest from torch's; 1e30 for NaN and infinity."""
    squares: dict[str, list[float]] = {}
    for recorded in calls:
        for name, output in session.run(_in_types(session.spec, recorded.inputs)).items():
            a, b = output.double().cpu(), recorded.outputs[name].double()
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += (a - b).square().sum().item()
            sums[1] += b.square().sum().item()
    errors = [math.sqrt(off / norm) if norm else (_WORST if off else 0.0) for off, norm in squares.values()]
    return max(error if math.isfinite(error) else _WORST for error in errors)


def _in_types(spec: ComponentSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from sdopt.weights.to_torch import TORCH_DTYPES

    return {tensor.name: inputs[tensor.name].to(TORCH_DTYPES[tensor.dtype]) for tensor in spec.inputs}
