"""The parity stage: torch in one child process, the graphs on a runtime in another, compared output by output."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.artifacts.fingerprint import digest_of
from sdopt.artifacts.manifest import ParityRecord
from sdopt.artifacts.safetensors_file import TensorRef
from sdopt.artifacts.store import Store
from sdopt.backends.open import probe_backend
from sdopt.build.resolve import BuildPlan
from sdopt.errors import ParityError
from sdopt.isolation import JsonTable, run_isolated
from sdopt.model.component import ComponentName, ComponentSpec
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.recipe import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.shape import Extent

STAGE = "parity"
_RECORD_NAME = "parity.json"


@dataclass(frozen=True)
class ParityJob:
    """One component for both children. `folder` holds its graph and weights, `tensors` are the checkpoint's."""

    spec: ComponentSpec
    config: dict[str, Any]
    family: Family
    extents: dict[str, Extent]
    tensors: dict[str, TensorRef]
    folder: Path
    graph_dtype: DType


_JOBS = TypeAdapter(list[ParityJob])
_SETTINGS: TypeAdapter[BackendSettings] = TypeAdapter(BackendSettings)


def choose_runtime() -> BackendSettings:
    """The runtime that parity runs on, in fp32: ONNX Runtime, which needs a quarter less memory, else OpenVINO."""
    if probe_backend(OnnxRuntimeSettings()).available:
        return OnnxRuntimeSettings(low_memory=True)
    return OpenVINOSettings()


def parity_key(plan: BuildPlan, name: ComponentName, weights_sha256: str, runtime: BackendSettings) -> str:
    version = probe_backend(runtime).version
    return digest_of([plan.components[name].architecture, weights_sha256, runtime.kind, version])


def find_parity(store: Store, key: str) -> ParityRecord | None:
    folder = store.find(STAGE, key)
    return ParityRecord.model_validate_json((folder / _RECORD_NAME).read_bytes()) if folder else None


def prove_parity(
    plan: BuildPlan, store: Store, staging: Path, work: Path, weights: Mapping[ComponentName, str]
) -> dict[ComponentName, ParityRecord]:
    """A record for every component, from the store or measured. Raises `ParityError` naming the first that fails."""
    runtime = choose_runtime()
    keys = {name: parity_key(plan, name, weights[name], runtime) for name in plan.components}
    records = {name: record for name, key in keys.items() if (record := find_parity(store, key))}
    missing = [name for name in plan.components if name not in records]
    if missing:
        for name, record in _measure(plan, missing, runtime, staging, work).items():
            if record.passed:  # a failure is looked at again: it may have been a fault of this run
                store.put(STAGE, keys[name], {_RECORD_NAME: json.dumps(record.model_dump(mode="json")).encode()})
            records[name] = record
    for name, record in records.items():
        if not record.passed:
            raise _describe_failure(name, record)
    return records


def _measure(
    plan: BuildPlan, names: list[ComponentName], runtime: BackendSettings, staging: Path, work: Path
) -> dict[ComponentName, ParityRecord]:
    jobs = [_describe_job(plan, name, staging) for name in names]
    arguments = {
        "jobs": _JOBS.dump_python(jobs, mode="json"),
        "work": str(work),
        "runtime": _SETTINGS.dump_python(runtime, mode="json"),
    }
    run_isolated("sdopt.build.parity:run_torch_in_child", arguments)
    outcome = run_isolated("sdopt.build.parity:run_engines_in_child", arguments)
    return {name: ParityRecord.model_validate(outcome.value[name]) for name in names}


def _describe_job(plan: BuildPlan, name: ComponentName, staging: Path) -> ParityJob:
    part = plan.components[name]
    return ParityJob(
        part.spec, dict(part.config), plan.checkpoint.family, dict(plan.extents), dict(part.tensors), staging / name,
        part.graph_dtype,
    )  # fmt: skip


def _describe_failure(name: ComponentName, record: ParityRecord) -> ParityError:
    worst = max(record.outputs, key=lambda output: output.relative_l2)
    far = (
        "NaN, infinity or another shape" if worst.relative_l2 > 1e9 else f"a relative error of {worst.relative_l2:.1e}"
    )
    return ParityError(
        f"the graph of {name} is not the network that torch runs: {worst.name} has {far} "
        f"(limit {record.relative_l2_limit:.0e}, on {record.runtime})",
        hint="this is a defect of the export: please report it with the model's config.json",
    )


def run_torch_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the first child: torch's outputs for each job, saved under `work`."""
    from sdopt.export.parity import make_inputs, run_reference

    jobs = _JOBS.validate_python(arguments["jobs"])
    for done, job in enumerate(jobs):
        progress.update(f"parity: torch runs {job.spec.name}", done / len(jobs))
        inputs = make_inputs(job.spec, job.config, job.extents)
        run_reference(
            job.spec, job.config, job.tensors, inputs, Path(arguments["work"]) / f"{job.spec.name}.safetensors"
        )
        gc.collect()
    return {}


def run_engines_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the second child: the graphs' outputs, compared with those saved by the first."""
    from safetensors.torch import load_file

    from sdopt.backends.open import open_session
    from sdopt.backends.protocol import ComponentFiles
    from sdopt.export.parity import compare_outputs, make_inputs

    jobs = _JOBS.validate_python(arguments["jobs"])
    runtime = _SETTINGS.validate_python(arguments["runtime"])
    records: JsonTable = {}
    for done, job in enumerate(jobs):
        progress.update(f"parity: {runtime.kind} runs {job.spec.name}", done / len(jobs))
        inputs = make_inputs(job.spec, job.config, job.extents)
        files = ComponentFiles(job.folder, job.spec, job.config, job.family, job.extents)
        with open_session(files, runtime) as session:
            outputs = session.run(inputs)
        expected = load_file(Path(arguments["work"]) / f"{job.spec.name}.safetensors")
        record = compare_outputs(job.spec, expected, outputs, runtime=runtime.kind, graph_dtype=job.graph_dtype)
        records[job.spec.name] = record.model_dump(mode="json")
    return records
