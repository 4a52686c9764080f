"""`sdopt convert` as a function: checkpoint -> plan -> weights and graphs -> parity -> fidelity -> published bundle."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sdopt.bundle.manifest import BundleManifest, write_manifest
from sdopt.bundle.records import (
    BuildRecord,
    ComponentRecord,
    FidelityRecord,
    GraphAudit,
    ParityRecord,
    Verdict,
)
from sdopt.convert.card import make_card, write_small_files
from sdopt.convert.fidelity import PictureJudge, judge
from sdopt.convert.finished import find_finished, vouch_for
from sdopt.convert.graphs import find_graph, trace_missing
from sdopt.convert.parity import prove_parity, require_runtimes
from sdopt.convert.plan import BuildPlan, require_backends
from sdopt.convert.plans.ladder import MadePlan, make_plans, place_plan
from sdopt.convert.plans.wanted import generations, require_builder
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.disk.file_records import record_file
from sdopt.disk.files import require_free_disk, write_file
from sdopt.disk.staging import Staging, drop_unknown, locked, require_ours
from sdopt.disk.store import Store, cache_root
from sdopt.errors import ExportError, UsageError
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.model.file_names import CONFIG_NAME, GRAPH_NAME, WEIGHTS_NAME
from sdopt.processes.nursery import current_nursery, own_nursery, submit_in_context
from sdopt.weights.stream import write_weights

# Graphs, tokenizers, the latents and pictures of the verdict.
_SMALL_FILES_BYTES = 200_000_000


def convert(plan: BuildPlan, output: Path, *, read_all: bool = False) -> BundleManifest:
    """Build the bundle that `plan` describes at `output`, and return its manifest.

    What an earlier run made is used again; a run that is killed leaves nothing at `output` and is gone on with by the
    next. A bundle that is there and is what `plan` describes is kept; `read_all` reads every byte of it first.
    Raises `ParityError` and `FidelityError` where the engines are not the model: then nothing is published.
    """
    cache = cache_root()
    output = Path(os.path.abspath(output))  # `-o .` has no name, and a link in the way is no reason to follow it
    require_ours(output)
    require_apart(plan, output)
    require_backends(plan)
    if plan.recipe.verify.enabled:
        require_runtimes(plan)
    if plan.recipe.target.runtime.makes_plans:
        require_builder(plan)
    with own_nursery(), locked(output, cache):
        store = Store(cache)
        if (finished := find_finished(plan, output, store, read_all=read_all)) is not None:
            return finished
        weights_bytes = sum(part.weights_bytes for part in plan.components.values())
        plans_bytes = weights_bytes * len(plan.profiles) * len(generations(plan))
        require_free_disk(output.parent, weights_bytes + plans_bytes + _SMALL_FILES_BYTES)
        staging = Staging(output)
        manifest = _build(plan, store, staging, cache)
        staging.publish()
        vouch_for(output, manifest.files, store)
    return manifest


def require_apart(plan: BuildPlan, output: Path) -> None:
    """Raise `UsageError` where the bundle would lie in its own checkpoint, or would replace a folder that holds it."""
    source = Path(plan.recipe.source)
    if not source.exists():
        return
    source, place = source.resolve(), output.resolve()
    if source in place.parents and source.is_dir():
        beside = shlex.quote(str(source.with_name(f"{source.name}-bundle")))
        raise UsageError(f"{output} lies inside the checkpoint {source}", hint=f"choose a folder outside: -o {beside}")
    if place == source or place in source.parents:
        beside = shlex.quote(str(place.with_name(f"{place.name}-bundle")))
        raise UsageError(
            f"the checkpoint {source} is in {output}, which a finished bundle would replace",
            hint=f"choose another folder: -o {beside}",
        )


def _build(plan: BuildPlan, store: Store, staging: Staging, cache: Path) -> BundleManifest:
    start_ns = time.monotonic_ns()
    weights: Mapping[ComponentName, FileRecord] = _make_weights_and_graphs(plan, store, staging, cache)
    found = {name: _require_graph(store, plan, name) for name in plan.components}
    write_small_files(plan, {name: graph for name, (graph, _) in found.items()}, staging.folder)
    parity: Mapping[ComponentName, ParityRecord] = {}
    if plan.recipe.verify.enabled:
        digests = {name: record.sha256 for name, record in weights.items()}
        parity = prove_parity(plan, store, staging.folder, staging.work, digests)
    audits = {name: audit for name, (_, audit) in found.items()}
    components = {
        name: ComponentRecord(
            spec=part.spec, precision=part.precision, precision_reason=part.precision_reason, backend=part.backend,
            architecture=part.architecture, weights_key=part.weights_key, audit=audits[name], parity=parity.get(name),
        )
        for name, part in plan.components.items()
    }  # fmt: skip
    draft = _draft_manifest(plan, staging.output.name, components, weights)
    pictures = PictureJudge(store, staging)
    if plan.quantization is not None:
        from sdopt.convert.blocks.select import Shop, quantize  # torch and onnx, for seconds

        wanted = pictures if plan.recipe.verify.enabled and plan.recipe.verify.fidelity else None
        quantized = quantize(Shop(plan, draft, weights, store, cache, staging, wanted))
        plan, draft, weights = quantized.plan, quantized.draft, quantized.weights
    made = make_plans(plan, store, cache, staging.folder, audits, weights)
    for each in made:
        place_plan(each, staging.folder)
    draft = _with_plans(draft, made)
    fidelity = judge(draft, pictures)
    manifest = draft.model_copy(update={"fidelity": fidelity})
    write_file(staging.folder / "README.md", make_card(manifest).encode())
    files = _record_files(staging.folder, plan, weights, made)
    reused = (*store.reused, *(["weights"] if staging.reused_weights else []))
    build = BuildRecord(wall_ns=time.monotonic_ns() - start_ns, reused=reused)
    manifest = manifest.model_copy(update={"files": files, "build": build})
    write_manifest(staging.folder, manifest)
    return manifest


def _make_weights_and_graphs(
    plan: BuildPlan, store: Store, staging: Staging, cache: Path
) -> dict[ComponentName, FileRecord]:
    """Trace in a child while this process copies the weights: one is bound by the processor, the other by the disk."""
    with ThreadPoolExecutor(1) as background:
        tracing = submit_in_context(background, trace_missing, plan, store, cache)
        # Inside: the pool waits for its thread when it is left, and the thread waits for the child.
        with _children_ended_on_error():
            weights = {name: _make_weights(plan, name, staging) for name in plan.components}
            tracing.result()
    return weights


@contextmanager
def _children_ended_on_error() -> Iterator[None]:
    """Ctrl-C or a failure must not wait for a child that traces on for a minute."""
    try:
        yield
    except BaseException:
        current_nursery().kill()
        raise


def _make_weights(plan: BuildPlan, name: ComponentName, staging: Staging) -> FileRecord:
    part = plan.components[name]
    if (record := staging.find_weights(name, part.weights_key)) is not None:
        return record
    (staging.folder / name).mkdir(exist_ok=True)
    path = staging.folder / name / WEIGHTS_NAME
    written = write_weights(path, part.tensors, part.graph_dtype, label=f"copying the weights of {name}")
    record = FileRecord(sha256=written.sha256, size_bytes=written.size_bytes)
    staging.note_weights(name, part.weights_key, record)
    return record


def _require_graph(store: Store, plan: BuildPlan, name: ComponentName) -> tuple[Path, GraphAudit]:
    found = find_graph(store, plan.components[name].architecture)
    if found is None:
        raise ExportError(f"the graph of {name} vanished from the store while it was used")
    return found


def _draft_manifest(
    plan: BuildPlan, name: str, components: dict[ComponentName, ComponentRecord],
    weights: Mapping[ComponentName, FileRecord],
) -> BundleManifest:  # fmt: skip
    """The manifest of the staged 16-bit bundle, before anything is quantised, compiled or judged."""
    checkpoint = plan.checkpoint
    assert checkpoint.prediction is not None
    digest = digest_of({component: record.sha256 for component, record in weights.items()})
    return BundleManifest(
        name=name,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        family=checkpoint.family,
        prediction=checkpoint.prediction,
        inpainting=checkpoint.inpainting,
        source=checkpoint.source.model_copy(update={"digest": digest}),
        recipe=plan.recipe,
        profile=plan.profile,
        profiles=plan.profiles,
        dialect=plan.recipe.dialect,
        components=components,
        files={},
        fidelity=FidelityRecord(verdict=Verdict.NOT_VERIFIED, reason="turned off by --no-verify or the recipe"),
        environment=describe_machine(),
    )


def _with_plans(draft: BundleManifest, made: Sequence[MadePlan]) -> BundleManifest:
    """The manifest as the verdict needs it: plans are opened by their digests."""
    components = {
        name: record.model_copy(
            update={"plans": tuple(plan for each in made if each.component is name for plan in each.records)}
        )
        for name, record in draft.components.items()
    }
    files = {**draft.files, **{each.records[0].file: each.file for each in made}}
    return draft.model_copy(update={"components": components, "files": files})


def _record_files(
    folder: Path, plan: BuildPlan, weights: Mapping[ComponentName, FileRecord], plans: Sequence[MadePlan]
) -> dict[str, FileRecord]:
    known = {f"{name}/{WEIGHTS_NAME}": record for name, record in weights.items()}
    known |= {made.records[0].file: made.file for made in plans}
    keep = set(known)
    keep |= {f"{name}/{file}" for name in plan.components for file in (GRAPH_NAME, CONFIG_NAME)}
    keep |= {"model_index.json", "README.md", "scheduler/scheduler_config.json"}
    for kind in plan.checkpoint.tokenizers:
        keep |= {path.relative_to(folder).as_posix() for path in (folder / kind).iterdir()}
    drop_unknown(folder, keep)
    return {relative: known.get(relative) or record_file(folder / relative) for relative in sorted(keep)}
