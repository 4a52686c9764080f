"""Run a bench: a fresh process for each candidate and repeat, interleaved, and a report of all of them.

A candidate that fails or hangs becomes a row with its message, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sdopt import progress
from sdopt.artifacts.files import hash_file
from sdopt.artifacts.machine import describe_machine
from sdopt.artifacts.manifest import MANIFEST_NAME, BundleManifest, ImageFidelity, read_manifest
from sdopt.bench.candidates import Baseline, Candidate, list_candidates
from sdopt.bench.environment import measure_machine, read_cpu_use
from sdopt.bench.report import (
    BenchReport,
    CandidateRecord,
    CaseRecord,
    MethodRecord,
    PictureRecord,
    ProcessRecord,
    Status,
)
from sdopt.errors import MissingDependency, SdoptError
from sdopt.fidelity.candidate import dump_settings, engines_use_gpu
from sdopt.fidelity.draw import Drawing, draw_isolated, read_drawing
from sdopt.fidelity.scene import DEFAULT_PROMPTS, Scene, write_scene
from sdopt.fidelity.verdict import NOISE_FLOOR, REFERENCE, compare_drawings
from sdopt.isolation import JsonTable, run_isolated
from sdopt.model.recipe import TorchSettings
from sdopt.pipeline.preflight import require_sound, require_trusted

_LEAST_PICTURES = 2
_MOST_PICTURES = 10
_PICTURE_BUDGET_S = 3.0


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. Empty `prompts` takes those of the bundle's recipe, or the package's own; `against` of None
    takes the usual baselines of the engines' device.

    `time_limit_s` is for each process; `command` is what the report tells the reader to run. `trust_engines` are
    SHA-256 of plans that were not built here, or of a `bundle.json`. `peer_python` is the interpreter of another tool's
    environment.
    """

    folder: Path
    against: tuple[str, ...] | None = None
    prompts: tuple[str, ...] = ()
    steps: int = 20
    repeats: int = 2
    time_limit_s: float = 1800.0
    command: str = ""
    trust_engines: tuple[str, ...] = ()
    peer_python: Path | None = None


@dataclass(frozen=True)
class BenchResult:
    """The report, what each candidate drew, by its name, and what torch fp32 drew where it could."""

    report: BenchReport
    drawings: Mapping[str, Drawing]
    reference: Drawing | None


@dataclass
class _Row:
    """A candidate while the bench runs."""

    candidate: Candidate
    drawing: Path
    processes: list[ProcessRecord] = field(default_factory=list)
    status: Status = Status.OK
    message: str = ""


def run_bench(request: BenchRequest, work: Path) -> BenchResult:
    """Measure every candidate. `work` is an existing folder for drawings.

    Raises `ArtifactError` for a folder that is no bundle or a damaged one, and `UnsafeInputError` for plans that nobody
    vouched for; a candidate's own failure is in its row.
    """
    manifest = read_manifest(request.folder)
    require_sound(request.folder, manifest)
    require_trusted(request.folder, manifest, request.trust_engines)
    before = read_cpu_use()
    verify = manifest.recipe.verify
    scene = Scene(
        prompts=request.prompts or verify.prompts or DEFAULT_PROMPTS, seed=verify.seed, steps=request.steps,
        guidance_scale=verify.guidance_scale, inputs=work / "inputs.safetensors",
    )  # fmt: skip
    write_scene(request.folder, manifest, scene)
    rows = {
        candidate.name: _Row(candidate, work / f"{candidate.name}.safetensors")
        for candidate in list_candidates(request.folder, manifest, request.against, request.peer_python)
    }
    order = interleave(list(rows), request.repeats)
    scheduler = ""
    for position, name in enumerate(order):
        scheduler = _run_row(request, scene, rows[name], position, len(order)) or scheduler
    drawings = {name: read_drawing(row.drawing) for name, row in rows.items() if row.status is Status.OK}
    reference, floor = _draw_references(request, manifest, scene, drawings, work)
    fidelity = (
        {name: compare_drawings(scene, reference, drawing, floor) for name, drawing in drawings.items()}
        if reference and floor
        else {}
    )
    report = BenchReport(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        case=_describe_case(request.folder, manifest, scene, scheduler),
        environment=describe_machine(),
        machine=measure_machine(before),
        method=MethodRecord(
            repeats=request.repeats, least_pictures=_LEAST_PICTURES, most_pictures=_MOST_PICTURES,
            picture_budget_s=_PICTURE_BUDGET_S, time_limit_s=request.time_limit_s, order=tuple(order),
            command=request.command,
        ),
        candidates=tuple(_record_row(row, fidelity.get(name, ())) for name, row in rows.items()),
    )  # fmt: skip
    return BenchResult(report, drawings, reference)


def interleave(names: Sequence[str], repeats: int) -> list[str]:
    """A B C, C B A, A B C, …: what drifts (heat, neighbours) falls on every candidate alike."""
    return [name for repeat in range(repeats) for name in (names if repeat % 2 == 0 else reversed(names))]


def _run_row(request: BenchRequest, scene: Scene, row: _Row, position: int, count: int) -> str:
    """Run a candidate once more, unless it failed before. Returns the scheduler's name or an empty string."""
    if row.candidate.missing:
        row.status, row.message = Status.SKIPPED, row.candidate.missing
    if row.status is not Status.OK:
        return ""
    label = f"{row.candidate.label} ({position + 1} of {count})"
    arguments: JsonTable = {
        "folder": str(row.candidate.folder),
        "manifest": row.candidate.manifest.model_dump_json(),
        "settings": dump_settings(row.candidate.settings),
        "scene": scene.model_dump(mode="json"),
        "output": "" if row.processes else str(row.drawing),
        "label": label,
        "least_pictures": _LEAST_PICTURES,
        "most_pictures": _MOST_PICTURES,
        "picture_budget_s": _PICTURE_BUDGET_S,
    }
    progress.update(f"{label}: starting", 0.0)
    try:
        arguments["launched_ns"] = time.monotonic_ns()
        outcome = run_isolated("sdopt.bench.measure:measure", arguments, timeout_s=request.time_limit_s)
    except SdoptError as error:
        row.status = Status.SKIPPED if isinstance(error, MissingDependency) else Status.FAILED
        row.message = str(error)
        return ""
    scheduler = str(outcome.value.pop("scheduler"))
    values = outcome.value | {"position": position, "peak_rss_bytes": outcome.peak_rss_bytes}
    row.processes.append(ProcessRecord.model_validate(values))
    return scheduler


def _draw_references(
    request: BenchRequest, manifest: BundleManifest, scene: Scene, drawings: Mapping[str, Drawing], work: Path
) -> tuple[Drawing | None, Drawing | None]:
    """What torch fp32 draws, and the noise floor. None where torch itself cannot draw: then nothing is
    known.
    """

    device: Literal["cpu", "cuda"] = "cuda" if engines_use_gpu(manifest) else "cpu"

    def draw(name: str, settings: TorchSettings, label: str) -> Drawing:
        settings = settings.model_copy(update={"device": device})
        path, limit_s = work / f"{name}.safetensors", request.time_limit_s
        return draw_isolated(request.folder, manifest, settings, scene, path, label=label, timeout_s=limit_s)

    reference = drawings.get(Baseline.EAGER_FP32.value)
    try:
        reference = reference or draw("reference", REFERENCE, "torch fp32")
        return reference, draw("noise-floor", NOISE_FLOOR, "torch fp32 again (noise floor)")
    except SdoptError:
        return reference, None


def _record_row(row: _Row, fidelity: tuple[ImageFidelity, ...]) -> CandidateRecord:
    return CandidateRecord(
        name=row.candidate.name, label=row.candidate.label,
        precision=row.candidate.precision, settings=row.candidate.settings_by_component(),
        status=row.status, message=row.message, processes=tuple(row.processes),
        fidelity=tuple(PictureRecord.model_validate(each.model_dump()) for each in fidelity),
        kind=row.candidate.kind,
    )  # fmt: skip


def _describe_case(folder: Path, manifest: BundleManifest, scene: Scene, scheduler: str) -> CaseRecord:
    profile = manifest.profile
    return CaseRecord(
        bundle=manifest.name, digest=hash_file(folder / MANIFEST_NAME), family=manifest.family,
        quantization={n: r.quantization for n, r in manifest.components.items() if r.quantization is not None},
        bundle_bytes=sum(file.size_bytes for file in manifest.files.values()),
        width_px=profile.width_px.opt, height_px=profile.height_px.opt, batch=profile.batch.min,
        prompts=scene.prompts, seed=scene.seed, steps=scene.steps, guidance_scale=scene.guidance_scale,
        scheduler=scheduler,
    )  # fmt: skip
