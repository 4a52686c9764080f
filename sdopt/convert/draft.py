"""The manifest while it grows: the staged 16-bit bundle, its plans, and at last every file's digest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import BuildRecord, ComponentRecord, FidelityRecord, PlanRecord, Verdict
from sdopt.convert.build import Build
from sdopt.convert.plans.ladder import MadePlan
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.disk.file_records import record_file
from sdopt.disk.staging import drop_unknown
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.model.file_names import CONFIG_NAME, GRAPH_NAME, SLOTS_GRAPH_NAME, WEIGHTS_NAME


def draft_manifest(build: Build) -> BundleManifest:
    """The manifest of the staged 16-bit bundle, before anything is quantised, compiled or judged."""
    plan, checkpoint = build.plan, build.plan.checkpoint
    assert checkpoint.prediction is not None
    components = {
        name: ComponentRecord(
            spec=part.spec, precision=part.precision, precision_reason=part.precision_reason, backend=part.backend,
            architecture=part.architecture, weights_key=part.weights_key, audit=build.graphs[name][1],
            parity=build.parity.get(name),
        )
        for name, part in plan.components.items()
    }  # fmt: skip
    digest = digest_of({component: record.sha256 for component, record in build.weights.items()})
    return BundleManifest(
        name=build.output.name,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        family=checkpoint.family,
        prediction=checkpoint.prediction,
        tasks=checkpoint.tasks,
        pixels_per_latent=checkpoint.pixels_per_latent,
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


def with_plans(draft: BundleManifest, made: Sequence[MadePlan]) -> BundleManifest:
    """The manifest as the verdict needs it: plans are opened by their digests."""

    def plans_of(name: ComponentName, *, has_slots: bool) -> tuple[PlanRecord, ...]:
        ours = (each for each in made if each.component is name and each.has_slots is has_slots)
        return tuple(plan for each in ours for plan in each.records)

    components = {}
    for name, record in draft.components.items():
        slots = record.slots and record.slots.model_copy(update={"plans": plans_of(name, has_slots=True)})
        components[name] = record.model_copy(update={"plans": plans_of(name, has_slots=False), "slots": slots})
    files = {**draft.files, **{each.records[0].file: each.file for each in made}}
    return draft.model_copy(update={"components": components, "files": files})


def record_files(build: Build) -> BundleManifest:
    """The whole manifest: every file with its digest, and what the build took. What is not in it is removed.

    Each copy on the way was made without validation; this one is validated as a whole.
    """
    folder, plan = build.staging.folder, build.plan
    known = {f"{name}/{WEIGHTS_NAME}": record for name, record in build.weights.items()}
    known |= {made.records[0].file: made.file for made in build.plans}
    keep = set(known)
    keep |= {f"{name}/{file}" for name in plan.components for file in (GRAPH_NAME, CONFIG_NAME)}
    keep |= {f"{name}/{SLOTS_GRAPH_NAME}" for name in build.slots}
    keep |= {"model_index.json", "README.md", "scheduler/scheduler_config.json"}
    for kind in plan.checkpoint.tokenizers:
        keep |= {path.relative_to(folder).as_posix() for path in (folder / kind).iterdir()}
    drop_unknown(folder, keep)
    files: dict[str, FileRecord] = {
        relative: known.get(relative) or record_file(folder / relative) for relative in sorted(keep)
    }
    reused = (*build.store.reused, *(["weights"] if build.staging.reused_weights else []))
    record = BuildRecord(wall_ns=time.monotonic_ns() - build.started_ns, reused=reused)
    manifest = build.manifest.model_copy(update={"files": files, "build": record})
    return BundleManifest.model_validate_json(manifest.model_dump_json())
