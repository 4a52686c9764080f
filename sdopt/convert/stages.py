"""The stages of `sdopt convert`, in order; `--dry-run` shows the estimates of the same list."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sdopt.convert.build import Build, Stage, Step
from sdopt.convert.card import make_card, write_small_files
from sdopt.convert.cost import COPY_BYTES_PER_S, cost_of, picture_s, pipeline_bytes
from sdopt.convert.draft import draft_manifest, record_files, with_plans
from sdopt.convert.fidelity import judge
from sdopt.convert.parity import prove_parity
from sdopt.convert.plans.ladder import make_plans, place_plan
from sdopt.convert.plans.wanted import generations, peak_bytes
from sdopt.convert.quantise import QUANTISE
from sdopt.convert.slot_graphs import SLOT_GRAPHS, has_second_graph
from sdopt.convert.weights_and_graphs import WEIGHTS_AND_GRAPHS
from sdopt.disk.files import write_file

_PLAN_FIXED_S, _PLAN_BYTES_PER_S = 2.0, 90e6
# The bundle has a picture of each of the verdict's prompts; without any in the recipe, two.
_PROMPTS = 2


def _nothing(build: Build) -> Iterator[Step]:
    """For what takes no time worth naming."""
    return iter(())


def _write_small_files(build: Build) -> None:
    write_small_files(build.plan, {name: path for name, (path, _) in build.graphs.items()}, build.staging.folder)


def _estimate_parity(build: Build) -> Iterator[Step]:
    for name, part in build.plan.components.items() if build.plan.recipe.verify.enabled else ():
        cost = cost_of(build.plan, name)
        # torch and the engine run one after the other; the engine folds its weights to fp32 beside the file's.
        seconds = 2 * cost.fp32_bytes / COPY_BYTES_PER_S + 2 * cost.run_s
        memory = cost.torch_bytes + cost.fp32_bytes
        yield Step("parity", name, part.architecture, False, 0, memory, seconds)


def _prove_parity(build: Build) -> None:
    if build.plan.recipe.verify.enabled:
        digests = {name: record.sha256 for name, record in build.weights.items()}
        build.parity = prove_parity(build.plan, build.store, build.staging.folder, build.staging.work, digests)
    build.draft = draft_manifest(build)


def _estimate_plans(build: Build) -> Iterator[Step]:
    """One for each plan. Whether the store has it is known only with the digest of its weights."""
    plan = build.plan
    for name, part in plan.components.items():
        memory = peak_bytes(part.weights_bytes)
        seconds = _PLAN_FIXED_S + part.weights_bytes / _PLAN_BYTES_PER_S
        step = Step("plan", name, part.architecture, False, part.weights_bytes, memory, seconds)
        graphs = 2 if has_second_graph(plan, name) else 1
        yield from [step] * (graphs * len(plan.profiles) * len(generations(plan)))


def _make_plans(build: Build) -> None:
    audits = {name: audit for name, (_, audit) in build.graphs.items()}
    build.plans = make_plans(
        build.plan, build.store, build.cache, build.staging.folder, audits, build.weights, build.slots
    )
    for made in build.plans:
        place_plan(made, build.staging.folder)
    build.draft = with_plans(build.manifest, build.plans)


def _estimate_fidelity(build: Build) -> Iterator[Step]:
    verify = build.plan.recipe.verify
    if build.draws_pictures:
        pictures = (len(verify.prompts) or _PROMPTS) * picture_s(build.plan, verify.steps)
        # torch twice, with two attention kernels, and the engines; of a quantised build torch's pictures are there.
        drawn = 3 if build.plan.quantization is None else 1
        yield Step("fidelity", "pipeline", "", False, 0, pipeline_bytes(build.plan), drawn * pictures)


def _judge_pictures(build: Build) -> None:
    build.draft = build.manifest.model_copy(update={"fidelity": judge(build.manifest, build.pictures)})


def _write_card(build: Build) -> None:
    write_file(build.staging.folder / "README.md", make_card(build.manifest).encode())
    build.draft = record_files(build)


STAGES: tuple[Stage, ...] = (
    WEIGHTS_AND_GRAPHS,
    Stage("small files", _nothing, _write_small_files),
    Stage("parity", _estimate_parity, _prove_parity),
    QUANTISE,
    SLOT_GRAPHS,
    Stage("plans", _estimate_plans, _make_plans),
    Stage("fidelity", _estimate_fidelity, _judge_pictures),
    Stage("card", _nothing, _write_card),
)


def estimate(build: Build, *, finished: bool) -> list[Step]:
    """Every step of the stages in order; all of them found where the bundle is finished already."""
    steps = [step for stage in STAGES for step in stage.estimate(build)]
    return [dataclasses.replace(step, found=True, expected_s=0.0) for step in steps] if finished else steps
