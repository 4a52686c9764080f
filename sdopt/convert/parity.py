"""The parity stage: torch in one child process, the graphs on a runtime in another, compared output by output."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.backends.probes import probe_backend
from sdopt.bundle.records import ParityRecord, SlotsRecord
from sdopt.convert.plan import BuildPlan
from sdopt.disk.digest import digest_of
from sdopt.disk.shelf import Shelf
from sdopt.disk.store import Store
from sdopt.errors import MissingDependency, ParityError
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName, ComponentSpec
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.shape import CHUNK_TOKENS, Extent, ShapeProfile
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable
from sdopt.weights.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    from sdopt.backends.slotted_session import SlottedSession

SHELF = Shelf("parity", ParityRecord)


@dataclass(frozen=True)
class ParityJob:
    """One component for both children, compared at the usual sizes of each of `points`.

    `folder` holds its graph and weights, `tensors` are the checkpoint's. With `slots`, the graph is the second
    one, and both run with a seeded adapter in all LoRA slots, and with seeded words where it takes words.
    """

    spec: ComponentSpec
    config: dict[str, Any]
    family: Family
    extents: dict[str, Extent]
    points: list[dict[str, Extent]]
    tensors: dict[str, TensorRef]
    folder: Path
    graph_dtype: DType
    runtime: BackendSettings
    slots: SlotsRecord | None = None


_JOBS = TypeAdapter(list[ParityJob])


def choose_runtime(graph_dtype: DType) -> BackendSettings:
    """The runtime that parity runs on: ONNX Runtime, which needs a quarter less memory, else OpenVINO.

    A graph that is typed bf16 is read by OpenVINO alone: it computes in the graph's types, with or without the hint.
    """
    if graph_dtype is not DType.BF16 and probe_backend(OnnxRuntimeSettings()).available:
        return OnnxRuntimeSettings(low_memory=True)
    return OpenVINOSettings()


def require_runtimes(plan: BuildPlan) -> None:
    """Raise `MissingDependency` before the work, where no runtime here can run one of the graphs."""
    for part in plan.components.values():
        probe = probe_backend(choose_runtime(part.graph_dtype))
        if not probe.available:
            raise MissingDependency(probe.missing, hint=probe.remedy)


def parity_key(plan: BuildPlan, name: ComponentName, weights_sha256: str, runtime: BackendSettings) -> str:
    version = probe_backend(runtime).version
    axes = plan.components[name].spec.named_axes
    points = [{axis: point[axis].opt for axis in axes} for point in list_points(plan, name)]
    return digest_of([plan.components[name].architecture, weights_sha256, runtime.kind, version, points])


def list_points(plan: BuildPlan, name: ComponentName) -> list[dict[str, Extent]]:
    """What a component is compared at, as sizes of the named axes: the usual size of every profile and every prompt
    length, each once; and the UNet also on the rows of a drawing without guidance.

    A graph with symbolic axes may be right at the sizes that it was traced at and wrong at others, so a range is
    entered a second time, away from its usual size and not square.
    """
    model = plan.checkpoint
    sizes = list(dict.fromkeys(size for profile in plan.profiles for size in _sizes_in(profile, model.multiple_px)))
    chunks = plan.profile.chunk_counts
    points: dict[tuple[Extent, ...], dict[str, Extent]] = {}
    for place in range(max(len(sizes), len(chunks))):
        width_px, height_px = sizes[place] if place < len(sizes) else sizes[0]
        tokens = CHUNK_TOKENS * (chunks[place] if place < len(chunks) else chunks[0])
        batch = plan.profile.batch.opt
        profile = ShapeProfile.static(width_px=width_px, height_px=height_px, batch=batch, tokens=tokens)
        extents = profile.axis_extents(model.pixels_per_latent)
        points.setdefault(tuple(extents[axis] for axis in plan.components[name].spec.named_axes), extents)
    if name is ComponentName.UNET and plan.profile.unguided:
        first = next(iter(points.values()))
        unguided = {**first, "cfg_batch": Extent.static(plan.profile.batch.opt)}
        points[tuple(unguided.values())] = unguided
    return list(points.values())


def _sizes_in(profile: ShapeProfile, multiple_px: int) -> list[tuple[int, int]]:
    def move(extent: Extent, *steps: int) -> int:
        # Smaller first: it costs less.
        return next((side for step in steps if (side := extent.opt + step * multiple_px) in extent), extent.opt)

    width_px, height_px = profile.width_px, profile.height_px
    return [(width_px.opt, height_px.opt), (move(width_px, -1, 1), move(height_px, -2, 2, -1, 1))]


def prove_parity(
    plan: BuildPlan, store: Store, staging: Path, work: Path, weights: Mapping[ComponentName, str]
) -> dict[ComponentName, ParityRecord]:
    """A record for every component, from the store or measured. Raises `ParityError` naming the first that fails."""
    keys = {
        name: parity_key(plan, name, weights[name], choose_runtime(part.graph_dtype))
        for name, part in plan.components.items()
    }
    records = {name: record for name, key in keys.items() if (record := SHELF.find(store, key))}
    missing = [name for name in plan.components if name not in records]
    if missing:
        for name, record in _measure(plan, missing, staging, work).items():
            if record.passed:  # a failure is looked at again: it may have been a fault of this run
                SHELF.put(store, keys[name], record)
            records[name] = record
    for name, record in records.items():
        if not record.passed:
            raise describe_failure(name, record)
    return records


def _measure(
    plan: BuildPlan, names: list[ComponentName], staging: Path, work: Path
) -> dict[ComponentName, ParityRecord]:
    return run_jobs([describe_job(plan, name, staging) for name in names], work)


def run_jobs(jobs: Sequence[ParityJob], work: Path) -> dict[ComponentName, ParityRecord]:
    """Measure each job, one of a component; torch's outputs are kept under `work` meanwhile."""
    arguments = {
        "jobs": _JOBS.dump_python(list(jobs), mode="json"),
        "work": str(work),
    }
    call(run_torch_in_child, arguments)
    outcome = call(run_engines_in_child, arguments)
    return {job.spec.name: ParityRecord.model_validate(outcome.value[job.spec.name]) for job in jobs}


def describe_job(plan: BuildPlan, name: ComponentName, staging: Path, slots: SlotsRecord | None = None) -> ParityJob:
    part = plan.components[name]
    return ParityJob(
        part.spec, dict(part.config), plan.checkpoint.family, dict(plan.extents), list_points(plan, name),
        dict(part.tensors), staging / name, part.graph_dtype, choose_runtime(part.graph_dtype), slots,
    )  # fmt: skip


def describe_failure(name: ComponentName, record: ParityRecord) -> ParityError:
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
    """Entry of the first child: torch's outputs for each job and point, saved under `work`."""
    from sdopt.trace.reference import load_reference, run_reference
    from sdopt.trace.seeded_adapter import apply_adapter, make_adapter
    from sdopt.trace.seeded_inputs import make_inputs
    from sdopt.trace.seeded_words import put_words

    jobs = _JOBS.validate_python(arguments["jobs"])
    for done, job in enumerate(jobs):
        progress.update(f"parity: torch runs {job.spec.name}", done / len(jobs))
        network = load_reference(job.spec, job.config, job.tensors)
        if job.slots is not None:
            apply_adapter(network, make_adapter(job.slots.slots, job.slots.rank))
            if job.slots.words is not None:
                put_words(network, job.slots.words)
        for place, point in enumerate(job.points):
            inputs = make_inputs(job.spec, job.config, point)
            run_reference(network, job.spec, inputs, _output_file(arguments, job, place))
        del network
        gc.collect()
    return {}


def run_engines_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the second child: the graphs' outputs, compared with those saved by the first."""
    from safetensors.torch import load_file

    from sdopt.backends.open import open_session
    from sdopt.backends.protocol import ComponentFiles
    from sdopt.backends.slotted_session import SlottedSession
    from sdopt.trace.compare_outputs import compare_outputs, worst_of
    from sdopt.trace.seeded_inputs import make_inputs
    from sdopt.trace.seeded_words import make_vectors, with_words

    jobs = _JOBS.validate_python(arguments["jobs"])
    records: JsonTable = {}
    for done, job in enumerate(jobs):
        progress.update(f"parity: {job.runtime.kind} runs {job.spec.name}", done / len(jobs))
        files = ComponentFiles(job.folder, job.spec, job.config, job.family, job.extents, slots=job.slots)
        compared: list[ParityRecord] = []
        with open_session(files, job.runtime) as session:
            if isinstance(session, SlottedSession):
                session.set_slots(seeded_slots(session))
            words = session.slots.words if isinstance(session, SlottedSession) else None
            if isinstance(session, SlottedSession) and words is not None:
                session.set_words(make_vectors(words))
            for place, point in enumerate(job.points):
                inputs = make_inputs(job.spec, job.config, point)
                outputs = session.run(inputs if words is None else with_words(inputs, words))
                expected = load_file(_output_file(arguments, job, place))
                compared.append(
                    compare_outputs(job.spec, expected, outputs, runtime=job.runtime.kind, graph_dtype=job.graph_dtype)
                )
        records[job.spec.name] = worst_of(compared).model_dump(mode="json")
    return records


def seeded_slots(session: SlottedSession) -> dict[str, Tensor]:
    """The adapter that torch's weights were changed by, as the engine's slots take it."""
    from sdopt.backends.slot_layout import name_inputs
    from sdopt.trace.seeded_adapter import make_adapter

    slots = {slot.layer: slot for slot in session.slots.slots}
    named = name_inputs(slots, make_adapter(slots.values(), session.slots.rank))
    return {name: value.to(session.slot_dtype) for name, value in named.items()}


def _output_file(arguments: JsonTable, job: ParityJob, place: int) -> Path:
    return Path(arguments["work"]) / f"{job.spec.name}-{place}.safetensors"
