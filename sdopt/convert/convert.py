"""`sdopt convert` as a function: the stages one after the other, and the one rename that publishes the bundle."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest, write_manifest
from sdopt.convert.build import Build, Step
from sdopt.convert.finished import find_finished, vouch_for
from sdopt.convert.parity import require_runtimes
from sdopt.convert.plan import BuildPlan, require_backends
from sdopt.convert.plans.wanted import generations, require_builder
from sdopt.convert.stages import STAGES, estimate
from sdopt.disk.files import require_free_disk
from sdopt.disk.staging import locked_output, require_ours
from sdopt.disk.store import Store, cache_root
from sdopt.errors import UsageError
from sdopt.processes.nursery import own_nursery

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
    with own_nursery(), locked_output(output, cache):
        known = Store(cache)  # what it finds is not what the build uses again
        if (finished := find_finished(plan, output, known, read_all=read_all)) is not None:
            return finished
        weights_bytes = sum(part.weights_bytes for part in plan.components.values())
        plans_bytes = weights_bytes * len(plan.profiles) * len(generations(plan))
        require_free_disk(output.parent, weights_bytes + plans_bytes + _SMALL_FILES_BYTES)
        build = Build(plan, output, Store(cache), cache)
        _run_stages(build)
        write_manifest(build.staging.folder, build.manifest)
        build.staging.publish()
        vouch_for(output, build.manifest.files, known)
    return build.manifest


def list_steps(plan: BuildPlan, output: Path, *, read_all: bool = False) -> list[Step]:
    """The steps of `convert(plan, output)` in order. Reads the store and what is at `output`, and builds nothing."""
    output, cache = Path(os.path.abspath(output)), cache_root()
    require_ours(output)
    require_apart(plan, output)
    finished = find_finished(plan, output, Store(cache), read_all=read_all) is not None
    return estimate(Build(plan, output, Store(cache), cache), finished=finished)


def _run_stages(build: Build) -> None:
    expected_s = [sum(step.expected_s for step in stage.estimate(build)) for stage in STAGES]
    for number, stage in enumerate(STAGES):
        if expected_s[number]:
            progress.announce(stage.name, sum(expected_s[number:]))
        stage.run(build)


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
