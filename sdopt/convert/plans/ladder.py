"""The plan stage: graphs and weights -> audited TensorRT plans, each in a child process, kept in the store.

A plan is keyed by its graph, its weights, the library's version, the GPU generation and the shapes: another checkpoint
of the same architecture builds its own plans and traces nothing. Bundles hold plans by hard links into the store, and a
plan that no bundle holds any more leaves the store after a day.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from sdopt.bundle.records import GraphAudit, PlanAudit, PlanRecord, SlotsRecord
from sdopt.bundle.trust import remember_built
from sdopt.convert.plan import BuildPlan
from sdopt.convert.plans.build import JOB, PlanJob, Rung
from sdopt.convert.plans.wanted import (
    WantedPlan,
    input_shapes,
    library_version,
    list_wanted,
    peak_bytes,
    requires_fused,
)
from sdopt.disk.digest import FileRecord
from sdopt.disk.files import disk_errors, hash_file, write_file
from sdopt.disk.store import Store
from sdopt.errors import MissingHardware, SdoptError
from sdopt.machine.environment import describe_system
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.component import ComponentName
from sdopt.model.file_names import GRAPH_NAME, SLOTS_GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.recipe import Dialect, parse_bytes
from sdopt.model.target import PORTABLE, Runtime
from sdopt.processes.call import call_by_name
from sdopt.processes.nursery import current_nursery, submit_in_context

STAGE = "plan"
_PLAN_NAME = "engine.plan"
_RECORD_NAME = "record.json"
_UNUSED_AFTER_S = 24 * 3600.0
# The builder takes and returns gigabytes many times over, and much of its time goes into page faults: large pages, and
# blocks that are kept for the next use, make them fewer. Other C libraries do not read this.
MALLOC_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=67108864"}
_SMALL_WORKSPACE_BYTES = 512 << 20

RUNGS = (
    Rung("side by side", side_by_side=True),
    Rung("one at a time"),
    Rung("one at a time, small workspace", workspace_bytes=_SMALL_WORKSPACE_BYTES),
    Rung(
        "one at a time, small workspace, weights streamed",
        weight_streaming=True,
        workspace_bytes=_SMALL_WORKSPACE_BYTES,
    ),
)
"""The ladder that a build goes down while memory runs out. The last two are of the GPU's memory, which only general
TensorRT needs while it builds."""


@dataclass(frozen=True)
class MadePlan:
    """A plan in the store: where, what it is, and its records in the manifest, one for each profile that it serves."""

    component: ComponentName
    path: Path
    file: FileRecord
    records: tuple[PlanRecord, ...]
    has_slots: bool


def make_plans(
    plan: BuildPlan,
    store: Store,
    cache: Path,
    staging: Path,
    audits: Mapping[ComponentName, GraphAudit],
    weights: Mapping[ComponentName, FileRecord],
    slots: Mapping[ComponentName, SlotsRecord],
) -> list[MadePlan]:
    """Every plan of the bundle, from the store or built; none for a runtime that compiles when it opens.

    Raises `AuditError` for a plan that is not what was asked for, and `MissingHardware` where no rung of the ladder
    fits into the memory.
    """
    if not plan.recipe.target.runtime.makes_plans:
        return []
    store.drop_unused(STAGE, older_than_s=_UNUSED_AFTER_S)
    wanted = list_wanted(plan, weights, slots)
    shop = _Workshop(plan, store, cache, staging, audits, weights)
    entries: dict[str, Path] = {}
    shortage: MissingHardware | None = None
    for rung in _rungs(plan):
        missing = [each for each in wanted if each.key not in entries]
        if missing and not (rung.side_by_side and not _fits_side_by_side(shop, missing)):
            made, shortage = _build_all(shop, missing, rung)
            entries |= made
    if shortage is not None:
        raise _explain_shortage(shop, next(each for each in wanted if each.key not in entries), shortage)
    return [_describe(plan, each, entries[each.key]) for each in wanted]


def _rungs(plan: BuildPlan) -> tuple[Rung, ...]:
    return tuple(r for r in RUNGS if plan.recipe.target.runtime is Runtime.TENSORRT or r.workspace_bytes is None)


@dataclass(frozen=True)
class _Workshop:
    """What every build of one bundle needs."""

    plan: BuildPlan
    store: Store
    cache: Path
    staging: Path
    audits: Mapping[ComponentName, GraphAudit]
    weights: Mapping[ComponentName, FileRecord]

    @property
    def limit_bytes(self) -> int | None:
        return parse_bytes(self.plan.recipe.max_memory) if self.plan.recipe.max_memory else None

    def need_bytes(self, name: ComponentName) -> int:
        return peak_bytes(self.weights[name].size_bytes, quantized=bool(self.plan.components[name].quantized))


def _explain_shortage(shop: _Workshop, wanted: WantedPlan, shortage: MissingHardware) -> MissingHardware:
    limit = f" of --max-memory {shop.plan.recipe.max_memory}" if shop.limit_bytes else ""
    need_gb = shop.need_bytes(wanted.component) / 1e9
    return MissingHardware(
        f"the memory{limit} was not enough to build {wanted.component} for {wanted.generation}: {shortage.message}",
        hint=f"it takes about {need_gb:.1f} GB: close other programs, give a larger --max-memory, or build on another "
        "machine: no GPU is needed for --target rtx",
    )


def _fits_side_by_side(shop: _Workshop, wanted: list[WantedPlan]) -> bool:
    """Whether the two largest builds together stay below the limit, and below what the machine has free."""
    needs = sorted((shop.need_bytes(each.component) for each in wanted), reverse=True)
    available_bytes = psutil.virtual_memory().available
    return len(needs) > 1 and sum(needs[:2]) <= min(available_bytes, shop.limit_bytes or available_bytes)


def _build_all(shop: _Workshop, wanted: list[WantedPlan], rung: Rung) -> tuple[dict[str, Path], MissingHardware | None]:
    """The folders of the entries that fitted into the memory, by key, and what the others said."""
    done: dict[str, Path] = {}
    shortage = None
    with ThreadPoolExecutor(2 if rung.side_by_side else 1) as pool:
        building = {each.key: submit_in_context(pool, _build, shop, each, rung) for each in wanted}
        try:
            for key, future in building.items():
                try:
                    done[key] = future.result()
                except MissingHardware as error:
                    shortage = error
        except BaseException:
            # Ctrl-C, or a plan that is wrong: the others must not be waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            current_nursery().kill()
            raise
    return done, shortage


def _build(shop: _Workshop, wanted: WantedPlan, rung: Rung) -> Path:
    return shop.store.make(STAGE, wanted.key, lambda folder: _fill(shop, wanted, rung, folder))


def _fill(shop: _Workshop, wanted: WantedPlan, rung: Rung, folder: Path) -> dict[str, str]:
    """Build one plan in a child process, into a folder of the store."""
    job = _describe_job(shop, wanted, rung, folder / _PLAN_NAME)
    try:
        outcome = call_by_name(
            "sdopt.convert.plans.build:build_in_child",
            JOB.dump_python(job, mode="json"),
            environment=MALLOC_ENVIRONMENT,
        )
    except SdoptError as error:
        # Under a limit, an allocation that fails where nobody looks ends the child in any way: SIGSEGV, SystemError.
        if job.memory_limit_bytes is not None and type(error) is SdoptError:
            raise MissingHardware("the process that built it ended for lack of memory") from error
        raise
    made = {**outcome.value, "rung": rung.name, "weight_streaming": rung.weight_streaming}
    record = json.dumps({**made, "build_peak_bytes": outcome.peak_rss_bytes}).encode()
    write_file(folder / _RECORD_NAME, record)
    remember_built(made["sha256"])
    return {_PLAN_NAME: made["sha256"], _RECORD_NAME: hash_file(folder / _RECORD_NAME)}


def _describe_job(shop: _Workshop, wanted: WantedPlan, rung: Rung, output: Path) -> PlanJob:
    plan, name = shop.plan, wanted.component
    part = plan.components[name]
    assert isinstance(part.backend, TensorRTSettings)
    limit_bytes = shop.limit_bytes
    if limit_bytes is not None and rung.side_by_side:
        limit_bytes -= max((shop.need_bytes(other) for other in plan.components if other != name), default=0)
    return PlanJob(
        kind=part.backend.kind, component=name, precision=part.precision,
        graph=shop.staging / name / (GRAPH_NAME if wanted.slots is None else SLOTS_GRAPH_NAME),
        weights=shop.staging / name / WEIGHTS_NAME, output=output, generation=wanted.generation,
        profiles=tuple(
            dict(table)
            for table in input_shapes(part.spec, wanted.profile, plan.checkpoint.pixels_per_latent, wanted.slots)
        ),
        attention_layers=shop.audits[name].attention_layers, native=plan.recipe.dialect is Dialect.NATIVE_ATTENTION,
        require_fused=requires_fused(plan, name), rung=rung, memory_limit_bytes=limit_bytes,
        timing_cache=_timing_cache(shop, wanted.generation), quantized=dict(part.quantized),
    )  # fmt: skip


def _timing_cache(shop: _Workshop, generation: str) -> Path | None:
    """Where general TensorRT keeps its timings of kernels. TensorRT-RTX takes none: it compiles where it runs."""
    if shop.plan.recipe.target.runtime is Runtime.RTX:
        return None
    return shop.cache / "timing" / f"tensorrt-{library_version(shop.plan)}-{generation}.cache"


def _describe(plan: BuildPlan, wanted: WantedPlan, folder: Path) -> MadePlan:
    made = json.loads((folder / _RECORD_NAME).read_bytes())
    part = plan.components[wanted.component]
    assert isinstance(part.backend, TensorRTSettings)
    chunks = wanted.profile.chunk_counts if "prompt_tokens" in part.spec.named_axes else (1,)
    name = _file_name(plan, wanted, made["version"])
    records = tuple(
        PlanRecord(
            file=f"{wanted.component}/{name}", flavour=part.backend.kind, version=made["version"],
            generation=wanted.generation, system=describe_system(), profile=index, prompt_chunks=chunks,
            weight_streaming=made["weight_streaming"], rung=made["rung"], build_s=made["build_s"],
            build_peak_bytes=made["build_peak_bytes"], build_peak_device_bytes=made.get("build_peak_device_bytes"),
            audit=PlanAudit.model_validate(made["audit"]),
        )
        for index in wanted.indices
    )  # fmt: skip
    path = folder / _PLAN_NAME
    file = FileRecord(sha256=made["sha256"], size_bytes=path.stat().st_size)
    return MadePlan(wanted.component, path, file, records, wanted.slots is not None)


def _file_name(plan: BuildPlan, wanted: WantedPlan, version: str) -> str:
    """`sm89.tensorrt-rtx-1.7.plan`, with the size where a bundle has several: `sm89-768x512.tensorrt-rtx-1.7.plan`, and
    `sm89-slots.tensorrt-rtx-1.7.plan` of the graph with LoRA slots.
    """
    kind = plan.components[wanted.component].backend.kind
    generation = "portable" if wanted.generation == PORTABLE else wanted.generation
    shared = len(wanted.indices) == len(plan.profiles)
    size = "" if shared else f"-{wanted.profile.size_text.replace('..', '-')}"
    slots = "" if wanted.slots is None else "-slots"
    return f"{generation}{size}{slots}.{kind}-{'.'.join(version.split('.')[:2])}.plan"


def place_plan(made: MadePlan, bundle: Path) -> None:
    """Give the bundle its plan: a hard link into the store, or a copy where that lies on another file system."""
    target = bundle / made.records[0].file
    target.unlink(missing_ok=True)
    with disk_errors(target):
        try:
            os.link(made.path, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            shutil.copyfile(made.path, target)
