"""The quantisation stage: calibrate, try every block, keep what pays, and see that the pictures stay.

It works on a staged 16-bit bundle, and leaves there what is to be published. Each measurement is kept in the store: a
build that was interrupted, or one of the same model again, comes through here in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.bundle.records import Verdict
from sdopt.convert.blocks.calibrate import calibrate
from sdopt.convert.blocks.choose import harm_of
from sdopt.convert.blocks.quantized_component import Candidate
from sdopt.convert.blocks.trajectories import Trajectories, record_trajectories
from sdopt.convert.blocks.trials import FORMAT, TrialJob
from sdopt.convert.blocks.write import StockJob, find_layers, stock_layers
from sdopt.convert.build import Build
from sdopt.convert.fidelity import runnable_here, stand_in
from sdopt.convert.plan import BuildPlan
from sdopt.disk.configs import find_prompts
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.disk.file_records import record_file
from sdopt.errors import FidelityError
from sdopt.fidelity.scene import DEFAULT_PROMPTS
from sdopt.graph.qdq import LayerChoice, takes
from sdopt.graph.sites import WeightedLayer
from sdopt.model.backend_settings import BackendSettings, TensorRTSettings
from sdopt.model.component import ComponentName
from sdopt.model.file_names import GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.quantization import ComponentQuantization, QuantizationSettings

# What a picture's time may grow by where weights alone are quantised, which saves memory and disk.
_SLACK_SHARE = 0.01


@dataclass(frozen=True)
class Quantized:
    """A plan and a draft whose components are quantised, and the weight files that are now staged."""

    plan: BuildPlan
    draft: BundleManifest
    weights: Mapping[ComponentName, FileRecord]


def quantize(build: Build) -> Quantized:
    """Decide on every block, and stage what is kept.

    Raises `CalibrationError` where no scale can be found, and `FidelityError` where the recipe requires quantised
    blocks and none pays.
    """
    recipe, calibration = build.plan.recipe, _settings(build).calibration
    drawn = set(recipe.verify.prompts or DEFAULT_PROMPTS)
    prompts = [prompt for prompt in find_prompts(calibration, recipe.source) if prompt not in drawn]
    trajectories = record_trajectories(
        build.staging.folder, build.manifest, build.store, calibration, prompts, build.cache
    )
    candidates = _try_components(build, trajectories)
    weights = dict(build.weights)
    if any(candidate.kept for candidate in candidates):
        if build.draws_pictures:
            progress.update("drawing what quantised engines are held against", 0.0)
            build.pictures.set_base(build.manifest)
        for candidate in candidates:
            candidate.set_aside(build.staging.work / "16-bit" / candidate.name)
        weights = _hold_pictures(build, candidates)
    if build.draws_pictures and not any(candidate.kept for candidate in candidates):
        build.pictures.drop_base()
    if recipe.require_quantized and not any(candidate.kept for candidate in candidates):
        raise FidelityError(
            f"no block pays with {recipe.quantization_file}: {explain_none(candidates)}",
            hint="leave out --require for a bundle in 16 bits; sdopt inspect then shows each block's figures",
        )
    return Quantized(_replan(build.plan, candidates), _redraft(build, candidates, trajectories, weights), weights)


def _settings(build: Build) -> QuantizationSettings:
    assert build.plan.quantization is not None
    return build.plan.quantization


def explain_none(candidates: Sequence[Candidate]) -> str:
    """Why nothing is quantised, in one sentence: the reason of the block that came nearest, and how many there are."""
    verdicts = [(group, verdict) for each in candidates for group, verdict in each.verdicts.items()]
    if not verdicts:
        return "the model has no layer that the quantization file names"
    group, verdict = min(verdicts, key=lambda item: item[1].measured.error)
    return f"of {len(verdicts)}, the gentlest ({group}) stays in 16 bits: {verdict.reason}"


def _try_components(build: Build, trajectories: Trajectories) -> list[Candidate]:
    """The UNet first: how long it runs decides what the others may cost."""
    names = [name for name in _settings(build).components if name in build.plan.components]
    candidates: list[Candidate] = []
    picture_ns = 0.0
    for name in sorted(names, key=lambda name: name is not ComponentName.UNET):
        candidate = _prepare(build, name, trajectories)
        if candidate is None:
            continue
        candidate.try_groups(_settings(build).held_out_error, _SLACK_SHARE * picture_ns)
        if name is ComponentName.UNET:
            picture_ns = build.plan.recipe.verify.steps * candidate.base_run_ns()
        candidates.append(candidate)
    return candidates


def _prepare(build: Build, name: ComponentName, trajectories: Trajectories) -> Candidate | None:
    """Calibrate and quantise all layers of a component that its settings name; None where there is none."""
    plan, part, settings = build.plan, build.plan.components[name], _settings(build).components[name]
    folder, calibration = build.staging.folder / name, _settings(build).calibration
    layers = find_layers(folder)
    groups = _group_layers(settings, layers.values(), smooth=calibration.smoothquant_alpha > 0)
    choices = {layer: choice for group in groups.values() for layer, choice in group.items()}
    if not choices:
        return None
    scales = None
    if settings.scheme.quantizes_activations:
        scales = calibrate(part, list(choices), trajectories, calibration, build.store, build.cache)
    stock = stock_layers(StockJob(folder, part.graph_dtype, choices, dict(part.tensors), scales))
    runtime, timed = _find_runtime(build, name)
    job = TrialJob(
        stock, part.spec, dict(read_config(build.staging.folder, name)), plan.checkpoint.family, dict(plan.extents),
        runtime, timed, list(trajectories.held_out), [], build.cache,
    )  # fmt: skip
    environment = build.manifest.environment
    identity = digest_of(
        [FORMAT, part.architecture, part.weights_key, trajectories.digest, scales and scales.parent.name,
         runtime.model_dump(mode="json"), timed, environment.processor, dict(environment.libraries)]
    )  # fmt: skip
    return Candidate(settings, groups, job, identity)


def _group_layers(
    settings: ComponentQuantization, layers: Iterable[WeightedLayer], *, smooth: bool
) -> dict[str, dict[str, LayerChoice]]:
    groups: dict[str, dict[str, LayerChoice]] = {}
    for layer in layers:
        group = settings.group_of(layer.name)
        if group and takes(layer, settings.scheme):
            smoothed = smooth and settings.scheme.quantizes_activations and layer.op != "Conv"
            groups.setdefault(group, {})[layer.name] = LayerChoice(settings.scheme, smoothed)
    return groups


def _find_runtime(build: Build, name: ComponentName) -> tuple[BackendSettings, bool]:
    """What trials run on, and whether that is the engine itself, whose time counts."""
    record = build.manifest.components[name]
    if isinstance(record.backend, TensorRTSettings):
        return stand_in(record).backend, False  # a plan for each trial would take minutes
    drawn, obstacle = runnable_here(build.manifest, build.staging.output, None)
    return drawn.components[name].backend, _settings(build).judge_speed and not obstacle


Selection = Mapping[ComponentName, frozenset[str]]
"""The groups of each component that are quantised."""


def _hold_pictures(build: Build, candidates: Sequence[Candidate]) -> dict[ComponentName, FileRecord]:
    """Take blocks back, the most harm for its gain first, until the pictures stay in the budget; stage what is left.

    Pictures are dear: how many blocks have to go is found by halving. Returns the records of all weight files.
    """
    ranked = sorted((harm_of(each.verdicts[g].measured), each.name, g) for each in candidates for g in each.kept)

    def fault_of(count: int) -> str:
        return _judge(build, _stage(build, candidates, _select(ranked[:count])))

    passing, failing, fault = 0, len(ranked) + 1, ""
    count = len(ranked)
    while count > passing:
        found = fault_of(count)
        if found:
            failing, fault = count, found
        else:
            passing = count
        count = (passing + failing) // 2
    chosen = _select(ranked[:passing])
    for each in candidates:
        each.keep_only(chosen.get(each.name, frozenset()), f"the pictures leave the budget with it: {fault}")
    for each in candidates:
        each.confirm()
    return _stage(build, candidates, {each.name: frozenset(each.kept) for each in candidates})


def _select(ranked: Sequence[tuple[float, ComponentName, str]]) -> Selection:
    names = {name for _, name, _ in ranked}
    return {name: frozenset(group for _, owner, group in ranked if owner == name) for name in names}


def _stage(build: Build, candidates: Sequence[Candidate], selection: Selection) -> dict[ComponentName, FileRecord]:
    """Write every candidate with these groups quantised into the staging folder; returns all weight records."""
    made = {
        each.name: each.publish(build.staging.folder / each.name, selection.get(each.name, frozenset()))
        for each in candidates
    }
    return {**build.weights, **made}


def _judge(build: Build, weights: Mapping[ComponentName, FileRecord]) -> str:
    """What is wrong with the pictures that the staged engines draw; empty where nothing is."""
    if not build.draws_pictures:
        return ""
    record = build.pictures.judge(
        build.manifest.model_copy(update={"files": record_quantized(build.staging.folder, weights)})
    )
    return record.reason if record.verdict is Verdict.FAIL else ""


def record_quantized(folder: Path, weights: Mapping[ComponentName, FileRecord]) -> dict[str, FileRecord]:
    """Graphs and weights of staged components: what tells one choice of blocks from another."""
    graphs = {f"{name}/{GRAPH_NAME}": record_file(folder / name / GRAPH_NAME) for name in weights}
    return graphs | {f"{name}/{WEIGHTS_NAME}": record for name, record in weights.items()}


def _replan(plan: BuildPlan, candidates: Sequence[Candidate]) -> BuildPlan:
    """The plan with what is quantised: plans of TensorRT are made from these graphs."""
    components = dict(plan.components)
    for each in candidates:
        layers = {layer: choice.scheme for layer, choice in each.layers.items()}
        components[each.name] = dataclasses.replace(components[each.name], quantized=layers)
    return dataclasses.replace(plan, components=components)


def _redraft(
    build: Build, candidates: Sequence[Candidate], trajectories: Trajectories,
    weights: Mapping[ComponentName, FileRecord],
) -> BundleManifest:  # fmt: skip
    components = dict(build.manifest.components)
    for each in candidates:
        record = each.describe(
            _settings(build), trajectories.digest, weights[each.name].size_bytes,
            build.weights[each.name].size_bytes,
        )  # fmt: skip
        components[each.name] = components[each.name].model_copy(update={"quantization": record})
    return build.manifest.model_copy(
        update={"components": components, "files": record_quantized(build.staging.folder, weights)}
    )
