"""The stage of slots: a second graph of a component, over the weight file that is there.

Every text encoder gets one that takes words from outside. With LoRA slots in the recipe, those are in the same graph,
and the UNet gets one as well. It is made of the staged graph, so of a quantised one too, and compared with torch while
a seeded adapter is in every slot and seeded words are in the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sdopt.bundle.records import GraphAudit, ParityRecord, SlotsRecord
from sdopt.convert.build import Build, Stage, Step
from sdopt.convert.cost import COPY_BYTES_PER_S, cost_of
from sdopt.convert.parity import SHELF, choose_runtime, describe_failure, describe_job, parity_key, run_jobs
from sdopt.convert.plan import BuildPlan
from sdopt.disk.digest import digest_of
from sdopt.disk.files import hash_file, write_file
from sdopt.model.component import ComponentName
from sdopt.model.file_names import GRAPH_NAME, SLOTS_GRAPH_NAME
from sdopt.model.slots import Slot, SlotSet, WordSlot
from sdopt.processes.call import call

_GRAPH_BYTES_PER_TENSOR = 1500
# Of what a quantised component may be off on the inputs of its own drawings: parity's are noise, and an adapter moves
# the ranges that its scales were made for.
_QUANTIZED_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class SlotJob:
    """The graph in `folder`, to be written beside it with LoRA slots where `layers` says which."""

    folder: Path
    layers: SlotSet | None
    attention_layers: int


@dataclasses.dataclass(frozen=True)
class SlotGraph:
    slots: tuple[Slot, ...]
    words: WordSlot | None
    audit: GraphAudit


def has_second_graph(plan: BuildPlan, name: ComponentName) -> bool:
    """Whether a component gets a second graph: a text encoder in any case, the UNet with LoRA slots."""
    return name.is_text_encoder or (name.takes_adapters and plan.recipe.slot_settings is not None)


def _estimate(build: Build) -> Iterator[Step]:
    slotted = build.plan.recipe.slot_settings is not None
    for name, part in build.plan.components.items():
        if has_second_graph(build.plan, name):
            cost = cost_of(build.plan, name)
            seconds = 2.0
            if build.plan.recipe.verify.enabled:
                seconds += 2 * cost.fp32_bytes / COPY_BYTES_PER_S + 2 * cost.run_s
            disk = len(part.tensors) * _GRAPH_BYTES_PER_TENSOR
            memory = cost.torch_bytes + cost.fp32_bytes
            yield Step("LoRA slots" if slotted else "words", name, part.architecture, False, disk, memory, seconds)


def _run(build: Build) -> None:
    settings = build.plan.recipe.slot_settings
    layers, rank = (None, 0) if settings is None else (settings.layers, settings.rank)
    made: dict[ComponentName, SlotsRecord] = {}
    for name in (name for name in build.plan.components if has_second_graph(build.plan, name)):
        job = SlotJob(build.staging.folder / name, layers, build.graphs[name][1].attention_layers)
        graph: SlotGraph = call(write_slots, job).value
        made[name] = SlotsRecord(layers=layers, rank=rank, slots=graph.slots, words=graph.words, audit=graph.audit)
    if build.plan.recipe.verify.enabled:
        made = _prove(build, made)
    build.slots = made
    components = {
        name: record.model_copy(update={"slots": made.get(name)}) for name, record in build.manifest.components.items()
    }
    build.draft = build.manifest.model_copy(update={"components": components})


def write_slots(job: SlotJob) -> SlotGraph:
    """Entry of a child. Raises `ExportError` where attention is not fused any more."""
    import onnx_ir as ir

    from sdopt.graph.audit import audit_graph, require_fused_attention
    from sdopt.graph.slots import add_slots
    from sdopt.graph.words import add_words

    name = ComponentName(job.folder.name)
    model = ir.load(job.folder / GRAPH_NAME)
    slots = () if job.layers is None else add_slots(model, job.layers)
    words = add_words(model) if name.is_text_encoder else None
    audit = audit_graph(model, job.attention_layers)
    require_fused_attention(name, audit)
    write_file(job.folder / SLOTS_GRAPH_NAME, ir.to_proto(model).SerializeToString(deterministic=True))
    return SlotGraph(slots, words, audit)


def _prove(build: Build, made: dict[ComponentName, SlotsRecord]) -> dict[ComponentName, SlotsRecord]:
    """Raises `ParityError` naming the first graph that does not compute what torch computes with the adapter."""
    keys = {name: _key(build, name, record) for name, record in made.items()}
    proven = {name: record for name, key in keys.items() if (record := SHELF.find(build.store, key))}
    jobs = [
        describe_job(build.plan, name, build.staging.folder, record)
        for name, record in made.items()
        if name not in proven
    ]
    if jobs:
        for name, record in run_jobs(jobs, build.staging.work).items():
            proven[name] = _with_limit(build, name, record)
            if proven[name].passed:
                SHELF.put(build.store, keys[name], proven[name])
    for name, record in proven.items():
        if not record.passed:
            raise describe_failure(name, record)
    return {name: record.model_copy(update={"parity": proven[name]}) for name, record in made.items()}


def _key(build: Build, name: ComponentName, record: SlotsRecord) -> str:
    part = build.plan.components[name]
    plain = parity_key(build.plan, name, build.weights[name].sha256, choose_runtime(part.graph_dtype))
    return digest_of([plain, record.rank, hash_file(build.staging.folder / name / SLOTS_GRAPH_NAME)])


def _with_limit(build: Build, name: ComponentName, record: ParityRecord) -> ParityRecord:
    quantization = build.manifest.components[name].quantization
    if quantization is None or not build.manifest.components[name].is_quantized:
        return record
    limit = _QUANTIZED_FACTOR * quantization.error_limit
    passed = all(output.relative_l2 <= limit for output in record.outputs)
    return record.model_copy(
        update={"passed": passed, "relative_l2_limit": limit, "cosine_distance_limit": limit**2 / 2}
    )


SLOT_GRAPHS = Stage("slots", _estimate, _run)
