"""Run a bench: a fresh process for each candidate and repeat, interleaved, and a report of all of them.

A candidate that fails, hangs or draws NaN becomes a row with its message, and the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sdopt import progress
from sdopt.bench.case.candidates import ENGINES, Baseline, Candidate, list_candidates
from sdopt.bench.case.report import (
    BenchReport,
    CandidateKind,
    CandidateRecord,
    ComponentErrorRecord,
    LayerRecord,
    MethodRecord,
    ProcessRecord,
    Scope,
    Stage,
    Status,
)
from sdopt.bench.case.suites import SuiteRun
from sdopt.bench.compare.component_errors import LayerTables, measure_component_errors, measure_layers
from sdopt.bench.compare.picture_errors import PictureFigures, compare_candidates
from sdopt.bench.describe import describe_audits, describe_case, find_build_time, find_size
from sdopt.bench.measure.process_environment import measure_conditions, measure_machine, read_cpu_use
from sdopt.bench.measure.roofline import find_roof
from sdopt.bench.measure.steady import Effort
from sdopt.bundle.damage import require_pipeline
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.disk.files import hash_file
from sdopt.errors import MissingDependency, SdoptError, UsageError
from sdopt.fidelity.candidate import dump_settings, engines_use_gpu
from sdopt.fidelity.drawings import Drawing, draw_isolated, draw_twice_isolated, read_drawing
from sdopt.fidelity.metrics import PictureFault, find_fault
from sdopt.fidelity.perceptual.local_weights import PerceptualWeights
from sdopt.fidelity.references import NOISE_FLOOR, REFERENCE, on_device
from sdopt.fidelity.scene import DEFAULT_PROMPTS, Scene, write_scene
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.lora import LoraUse
from sdopt.preflight.runnable import require_sound, require_trusted
from sdopt.processes.call import How, Outcome, call_by_name
from sdopt.processes.channel import JsonTable

_ENTRIES = {
    Scope.PICTURES: "sdopt.bench.measure.measure:measure",
    Scope.UNET: "sdopt.bench.measure.unet:measure_unet",
}

USUAL_REPEATS = 3
FEW_REPEATS = 2
"""Fewer leave no interval; of a candidate that is three times as slow, a wide one says all there is to say."""
_FAR_SLOWER = 3.0


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. Empty `prompts` takes those of the bundle's recipe, or the package's own; `against` of None
    takes the usual baselines of the engines' device; `guidance_scale` of None that of the bundle's recipe.

    `repeats` of None takes `USUAL_REPEATS` processes for each candidate, and `FEW_REPEATS` for one that is far slower
    than the engines. `time_limit_s` is for each process; `command` is what the report tells the reader to run, and
    `suite` the name of the suite that asked. `trust_engines` are SHA-256 of plans that were not built here, or of a
    `bundle.json`. `peer_python` is the interpreter of another tool's environment. `layers` compares the engines with
    torch layer by layer.
    """

    folder: Path
    against: tuple[str, ...] | None = None
    prompts: tuple[str, ...] = ()
    steps: int = 20
    repeats: int | None = None
    time_limit_s: float = 1800.0
    command: str = ""
    trust_engines: tuple[str, ...] = ()
    peer_python: Path | None = None
    scope: Scope = Scope.PICTURES
    guidance_scale: float | None = None
    suite: str = ""
    effort: Effort = field(default_factory=Effort)
    perceptual: PerceptualWeights = field(default_factory=PerceptualWeights)
    layers: bool = False
    loras: tuple[LoraUse, ...] = ()
    """Files with their digests, which act on every picture."""


def apply_run(base: BenchRequest, suite: str, run: SuiteRun) -> BenchRequest:
    """The request for one run of the suite of that name: `base` is what a suite does not say."""
    method, case = run.method, run.case
    effort = Effort(
        least_pictures=method.least_pictures, most_pictures=method.most_pictures,
        picture_budget_s=method.picture_budget_s,
    )  # fmt: skip
    return replace(
        base, against=case.against, prompts=case.prompts, steps=run.steps, guidance_scale=case.guidance_scale,
        scope=case.scope, repeats=method.repeats, time_limit_s=method.time_limit_s, suite=suite, effort=effort,
    )  # fmt: skip


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
    scheduler: str = ""


@dataclass(frozen=True)
class _Origins:
    """Where differences come from: by candidate its components' errors, and the engines' layers."""

    errors: Mapping[str, dict[ComponentName, ComponentErrorRecord]]
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Compared:
    """What was drawn, by candidate and by torch fp32, how it differs, and why there may be nothing to compare with."""

    drawings: Mapping[str, Drawing]
    reference: Drawing | None
    figures: PictureFigures
    notes: tuple[str, ...] = ()


def run_bench(request: BenchRequest, work: Path) -> BenchResult:
    """Measure every candidate. `work` is an existing folder for drawings.

    Raises `ArtifactError` for a folder that is not a bundle or a damaged one, and `UnsafeInputError` for plans that
    nobody vouched for; a candidate's own failure is in its row.
    """
    request = replace(request, folder=open_links(request.folder))
    manifest = read_manifest(request.folder)
    require_pipeline(request.folder, manifest)
    require_sound(request.folder, manifest)
    require_trusted(request.folder, manifest, request.trust_engines)
    if request.loras and request.scope is Scope.UNET:
        raise UsageError("this suite measures the UNet alone, without LoRAs", hint="leave out --lora, or take pictures")
    before = read_cpu_use()
    scene = _prepare_scene(request, manifest, work)
    rows = {
        candidate.name: _Row(candidate, work / f"{candidate.name}.safetensors")
        for candidate in list_candidates(
            request.folder, manifest, request.against, request.peer_python, request.trust_engines, request.loras
        )
    }
    order = _run_rows(request, scene, rows)
    roof = find_roof(request.folder, manifest, request.time_limit_s)
    origins = _measure_origins(request, manifest, rows, work)
    compared = _compare_pictures(request, manifest, scene, rows, work)
    scheduler = next((row.scheduler for row in rows.values() if row.scheduler), "")
    report = BenchReport(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        case=describe_case(request.folder, manifest, scene, request.scope, scheduler, roof.flops),
        environment=describe_machine(),
        machine=measure_machine(before),
        method=_describe_method(request, order),
        candidates=tuple(_record_row(row, compared.figures, origins) for row in rows.values()),
        roofline=roof.roofline,
        plugins=dict(compared.figures.plugins),
        audits={name: audits for name, row in rows.items() if (audits := describe_audits(row.candidate))},
        notes=(*_note_repeats(request, rows), *roof.notes, *origins.notes, *compared.notes),
    )
    return BenchResult(report, compared.drawings, compared.reference)


def measure_process(request: BenchRequest, name: str, work: Path) -> ProcessRecord:
    """One process of the candidate `name`, as `run_bench` runs it; nothing is compared. `work` as there.

    Raises what `run_bench` raises, and `SdoptError` for a candidate that is not there or fails.
    """
    manifest = read_manifest(request.folder)
    require_pipeline(request.folder, manifest)
    require_sound(request.folder, manifest)
    require_trusted(request.folder, manifest, request.trust_engines)
    candidates = list_candidates(
        request.folder, manifest, request.against, request.peer_python, request.trust_engines, request.loras
    )
    found = next((candidate for candidate in candidates if candidate.name == name), None)
    if found is None:
        raise SdoptError(f"there is no candidate {name!r}; there are {', '.join(each.name for each in candidates)}")
    row = _Row(found, work / f"{name}.safetensors")
    # Its only child but the measured one: a zygote would import more than this child needs.
    scene = _prepare_scene(request, manifest, work, how=How.FRESH)
    _run_row(request, scene, row, 0, 1, 0.0)
    if row.status is not Status.OK:
        raise SdoptError(f"{found.label} {row.status}: {row.message}")
    return row.processes[0]


def _prepare_scene(request: BenchRequest, manifest: BundleManifest, work: Path, *, how: How = How.WARM) -> Scene:
    """The scene, with its inputs on disk: one file for every candidate."""
    verify = manifest.recipe.verify
    scene = Scene(
        prompts=request.prompts or verify.prompts or DEFAULT_PROMPTS, seed=verify.seed, steps=request.steps,
        guidance_scale=verify.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        inputs=work / "inputs.safetensors", loras=request.loras,
    )  # fmt: skip
    if request.scope is Scope.PICTURES:
        write_scene(request.folder, manifest, scene, how=how)
    else:
        from sdopt.bench.measure.unet import write_inputs

        write_inputs(request.folder, manifest, scene.inputs)
    return scene


def interleave(names: Sequence[str], repeats: int) -> list[str]:
    """A B C, C B A, A B C, …: what drifts (heat, neighbours) falls on every candidate alike."""
    return [name for repeat in range(repeats) for name in (names if repeat % 2 == 0 else reversed(names))]


def _run_rows(request: BenchRequest, scene: Scene, rows: Mapping[str, _Row]) -> list[str]:
    """Run every candidate as often as was asked for; returns their names in the order of the processes.

    Where nothing was asked for, the first round says what a picture costs, and the counts are chosen from that.
    """
    order: list[str] = []
    planned = interleave(list(rows), request.repeats or USUAL_REPEATS)
    taken_s: dict[str, float] = {}  # by the last process of each candidate
    for position, name in enumerate(planned):
        if request.repeats is None and order.count(name) >= FEW_REPEATS and _is_far_slower(request, rows, name):
            continue
        # A candidate that has not run yet takes as long as the others did, as far as anybody knows.
        usual_s = statistics.fmean(taken_s.values()) if taken_s else 0.0
        left_s = sum(taken_s.get(each, usual_s) for each in planned[position:])
        start = time.monotonic()
        _run_row(request, scene, rows[name], len(order), len(planned), left_s)
        taken_s[name] = time.monotonic() - start
        order.append(name)
    return order


def _is_far_slower(request: BenchRequest, rows: Mapping[str, _Row], name: str) -> bool:
    """By the medians of the first processes, each candidate's against that of the engines."""
    engines_ns, candidate_ns = (_first_median_ns(request, rows[each]) for each in (ENGINES, name))
    return engines_ns is not None and candidate_ns is not None and candidate_ns > _FAR_SLOWER * engines_ns


def _first_median_ns(request: BenchRequest, row: _Row) -> float | None:
    stage = Stage.UNET_STEP if request.scope is Scope.UNET else Stage.END_TO_END
    samples_ns = row.processes[0].samples_ns.get(stage, ()) if row.processes else ()
    return statistics.median(samples_ns) if samples_ns else None


def _note_repeats(request: BenchRequest, rows: Mapping[str, _Row]) -> tuple[str, ...]:
    """Which candidates had fewer processes than the others, and why."""
    if request.repeats is not None:
        return ()
    few = [row for row in rows.values() if row.status is Status.OK and len(row.processes) < USUAL_REPEATS]
    return tuple(
        f"{row.candidate.label} was measured in {len(row.processes)} processes instead of {USUAL_REPEATS}: it is more "
        f"than {_FAR_SLOWER:.0f} times as slow as the engines. --repeats {USUAL_REPEATS} measures all alike"
        for row in few
    )


def _run_row(request: BenchRequest, scene: Scene, row: _Row, position: int, count: int, left_s: float) -> None:
    """Run a candidate once more, unless it failed before. `left_s` is about what this and all others still take."""
    if row.candidate.missing:
        row.status, row.message = Status.SKIPPED, row.candidate.missing
    elif request.loras and row.candidate.kind is CandidateKind.PEER:
        row.status, row.message = Status.SKIPPED, "another tool is not measured with LoRAs"
    elif request.scope is Scope.UNET and row.candidate.kind is CandidateKind.PEER:
        row.status, row.message = Status.SKIPPED, "another tool's UNet is not measured apart from its pipeline"
    if row.status is not Status.OK:
        return
    label = f"{row.candidate.label} ({position + 1} of {count})"
    update = {} if row.candidate.fills else {"loras": ()}
    arguments: JsonTable = {
        "folder": str(row.candidate.folder),
        "manifest": row.candidate.manifest.model_dump_json(),
        "settings": dump_settings(row.candidate.settings),
        "scene": scene.model_copy(update=update).model_dump(mode="json"),
        "output": "" if row.processes or request.scope is Scope.UNET else str(row.drawing),
        "label": label,
        "effort": asdict(request.effort),
    }
    progress.announce(f"{label}: starting", left_s)
    before = read_cpu_use()
    try:
        outcome = _launch(row.candidate, arguments, request)
    except SdoptError as error:
        row.status = Status.SKIPPED if isinstance(error, MissingDependency) else Status.FAILED
        row.message = str(error)
        return
    values = outcome.value | {"position": position, "peak_rss_bytes": outcome.peak_rss_bytes}
    row.scheduler = str(values.pop("scheduler", ""))
    # The child sees its clock and what slows it; who else was there, only its parent can tell.
    seen = measure_conditions(before).model_dump(include={"neighbours_cores", "steal_cores"})
    values["conditions"] = values.get("conditions", {}) | seen
    row.processes.append(ProcessRecord.model_validate(values))
    if arguments["output"] and _drew_nan(row.drawing):
        row.status, row.message = Status.FAILED, "the picture has NaN or Inf in it"


def _launch(candidate: Candidate, arguments: JsonTable, request: BenchRequest) -> Outcome[JsonTable]:
    arguments["launched_ns"] = time.monotonic_ns()
    if candidate.kind is CandidateKind.PEER:
        from sdopt.bench.measure.peer import run_peer

        return run_peer(candidate, arguments, request.time_limit_s)
    return call_by_name(_ENTRIES[request.scope], arguments, how=How.FRESH, timeout_s=request.time_limit_s)


def _drew_nan(path: Path) -> bool:
    return any(find_fault(image) is PictureFault.NOT_FINITE for image in read_drawing(path).images)


def _measure_origins(request: BenchRequest, manifest: BundleManifest, rows: Mapping[str, _Row], work: Path) -> _Origins:
    """Of every candidate that ran, the errors of its components; with `layers`, the engines' layers."""
    # A component is held against torch on the weights of the measured bundle, without LoRAs.
    ran = [row.candidate for row in rows.values() if row.processes and (row.candidate.fills or not request.loras)]
    limit_s = request.time_limit_s
    found = measure_component_errors(request.folder, manifest, ran, request.scope, work, limit_s)
    notes = [f"the components of {name} were not compared: {message}" for name, message in found.messages.items()]
    layers = LayerTables(())
    if request.layers:
        layers = measure_layers(request.folder, manifest, work, limit_s)
        notes += [layers.remark] if layers.remark else []
    return _Origins(found.errors, layers.layers, tuple(notes))


def _compare_pictures(
    request: BenchRequest, manifest: BundleManifest, scene: Scene, rows: Mapping[str, _Row], work: Path
) -> _Compared:
    """Compare what each candidate drew with what torch fp32 draws. Nothing is drawn for the UNet alone."""
    if request.scope is Scope.UNET:
        return _Compared({}, None, PictureFigures({}, {}, {}))
    drawings = {
        name: read_drawing(row.drawing) for name, row in rows.items() if row.status is Status.OK and row.candidate.alike
    }
    reference = drawings.get(Baseline.EAGER_FP32.value)
    floor: Drawing | None = None
    notes: tuple[str, ...] = ()
    label, limit_s = "torch fp32", request.time_limit_s
    device: Literal["cpu", "cuda"] = "cuda" if engines_use_gpu(manifest) else "cpu"
    outputs = (work / "reference.safetensors", work / "noise-floor.safetensors")
    try:
        if reference is None:
            reference, floor = draw_twice_isolated(
                request.folder, manifest, on_device(device, REFERENCE), scene, outputs, label=label, timeout_s=limit_s
            )
        else:
            floor = draw_isolated(
                request.folder, manifest, on_device(device, NOISE_FLOOR), scene, outputs[1],
                label=f"{label} again (noise floor)", timeout_s=limit_s,
            )  # fmt: skip
    except SdoptError as error:
        missing = "the pictures were not compared" if reference is None else "the noise floor is not known"
        notes = (f"{missing}, because torch fp32 could not draw: {error.message}",)
    figures = compare_candidates(scene, reference, floor, drawings, request.perceptual)
    return _Compared(drawings, reference, figures, notes)


def _describe_method(request: BenchRequest, order: Sequence[str]) -> MethodRecord:
    return MethodRecord(
        repeats=request.repeats or USUAL_REPEATS, time_limit_s=request.time_limit_s, order=tuple(order),
        command=request.command, suite=request.suite, **asdict(request.effort),
    )  # fmt: skip


def _record_row(row: _Row, figures: PictureFigures, origins: _Origins) -> CandidateRecord:
    candidate = row.candidate
    return CandidateRecord(
        name=candidate.name, label=candidate.label, precision=candidate.precision,
        settings=candidate.settings_by_component(), precisions=candidate.precision_by_component(),
        status=row.status, message=row.message,
        processes=tuple(row.processes), fidelity=figures.pictures.get(candidate.name, ()), kind=candidate.kind,
        digest="" if candidate.kind is CandidateKind.PEER else hash_file(candidate.folder / MANIFEST_NAME),
        size_bytes=find_size(candidate), build_ns=find_build_time(candidate), fid=figures.fid.get(candidate.name),
        errors=origins.errors.get(candidate.name, {}),
        layers=origins.layers if candidate.kind is CandidateKind.ENGINES else (),
    )  # fmt: skip
