"""What must hold before a runtime sees a byte of a bundle, in the order in which it is asked.

Sound: a graph tells a runtime which files to map and where, so it is opened only when its digest is the manifest's and
its external data are plain ranges of plain files beside it; a plan only when every byte of it is the manifest's.
Trusted: a plan is compiled code, and is opened only when this user built it here or named its digest. Runnable: the
machine has what the engines need.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from sdopt.backends.probes import probe_backend
from sdopt.bundle.again import again_command, beside
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.plan_header import find_contradictions
from sdopt.bundle.trust import list_untrusted
from sdopt.disk.file_records import find_damage
from sdopt.disk.files import hash_file, resolve_inside
from sdopt.errors import ArtifactError, MissingDependency, MissingHardware, UnsafeInputError
from sdopt.graph.external_data import check_graph_file
from sdopt.machine.environment import Machine, find_machine
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.file_names import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME
from sdopt.model.precision import Precision
from sdopt.preflight.plan_choice import PlanChoice, choose_plans

_WEIGHTS_SUFFIX = f"/{WEIGHTS_NAME}"


def require_sound(folder: Path, manifest: BundleManifest) -> None:
    """Check every file but the weights by its digest, weight files by their size, where graphs point, and that plans
    are what the manifest says.

    Weights are data, and hashing gigabytes at each load would double its time; `sdopt check` does it. Plans are code,
    and are hashed each time. Raises `ArtifactError` naming all that is damaged, and `UnsafeInputError` for a graph that
    names a place outside its folder.
    """
    hashed = [name for name in manifest.engine_files if not name.endswith(_WEIGHTS_SUFFIX)]
    damage = find_damage(folder, manifest.files, only=hashed)
    for name, record in manifest.files.items():
        path = resolve_inside(folder, name)
        if name.endswith(_WEIGHTS_SUFFIX) and (not path.is_file() or path.stat().st_size != record.size_bytes):
            damage.append(f"{name} is missing or truncated")
    damage = damage or find_bad_plans(folder, manifest)
    if damage:
        raise ArtifactError(
            f"{folder} is damaged: {'; '.join(damage)}", hint=f"build it again: {again_command(folder)}"
        )
    for component in manifest.components:
        if f"{component}/{GRAPH_NAME}" not in manifest.files:
            raise ArtifactError(f"{folder}: the manifest names no graph of {component}")
        check_graph_file(folder / component / GRAPH_NAME)


def find_bad_plans(folder: Path, manifest: BundleManifest) -> list[str]:
    """One sentence for each plan that has no digest, lies in a wrong place, or contradicts its record.

    The digests were found to fit before: a plan that was exchanged together with its digest is seen here.
    """
    found: list[str] = []
    for name, record in manifest.components.items():
        if isinstance(record.backend, TensorRTSettings) and not record.plans:
            found.append(f"the manifest names no plan of {name}")
        for file, plan in {plan.file: plan for plan in record.every_plan}.items():
            if file not in manifest.files or Path(file).parent.as_posix() != name:
                found.append(f"the manifest has no digest of {file} in the folder of {name}")
            else:
                found += find_contradictions(folder, plan)
    return found


def require_trusted(folder: Path, manifest: BundleManifest, trust_engines: Iterable[str] = ()) -> None:
    """Raise `UnsafeInputError` where a plan was neither built here nor named by `trust_engines` (SHA-256 of a plan or
    of `bundle.json`).
    """
    named = tuple(trust_engines)
    untrusted = list_untrusted(folder, manifest, named)
    if untrusted and named:
        raise UnsafeInputError(
            f"--trust-engine does not name {', '.join(untrusted)} of {folder}, which was not built here either",
            hint="it is not the bundle that was meant, or it was changed: get it again from whoever made it",
        )
    if untrusted:
        command = ["sdopt", "check", str(folder), "--trust-engine", hash_file(folder / MANIFEST_NAME)]
        count = "an engine that was" if len(untrusted) == 1 else f"{len(untrusted)} engines that were"
        raise UnsafeInputError(
            f"{folder} has {count} not built here, and an engine is compiled code that could do anything",
            hint=f"if you trust whoever made it: {shlex.join(command)}",
        )


def require_runnable(folder: Path, manifest: BundleManifest, machine: Machine | None = None) -> PlanChoice:
    """The plans that this machine runs, by component; none for runtimes that open graphs.

    About plans it answers from the manifest, and asks their runtime only after that whether it works here; no runtime
    sees a byte. With another `machine` than this one, for which None stands, runtimes of plans are not asked. Raises
    `EnvironmentMissingError` where the machine lacks a runtime, the arithmetic that an engine needs, or what its plans
    need.
    """
    chosen: PlanChoice = {}
    if any(record.plans for record in manifest.components.values()):
        chosen = choose_plans(folder, manifest, machine or find_machine())
    for name, record in manifest.components.items():
        if name in chosen and machine is not None:
            continue
        probe = probe_backend(record.backend)
        if not probe.available:
            raise MissingDependency(f"{name} needs {record.backend.kind}: {probe.missing}", hint=probe.remedy)
        if record.precision not in probe.precisions:
            raise MissingHardware(
                f"{name} computes in {record.precision}, which {record.backend.kind} cannot on this processor",
                hint=again_command(folder, output=beside(folder, "fp32"), precision=Precision.FP32),
            )
    return chosen
