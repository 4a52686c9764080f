"""What a report says of a case and of a candidate that no measuring is needed for: sizes, audits, the case itself."""

from __future__ import annotations

from pathlib import Path

from sdopt.bench.case.candidates import Candidate
from sdopt.bench.case.report import CandidateKind, CaseRecord, Scope
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ComponentRecord, PlanRecord
from sdopt.disk.files import hash_file
from sdopt.errors import SdoptError
from sdopt.fidelity.scene import Scene
from sdopt.machine.environment import find_machine
from sdopt.model.component import ComponentName
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.preflight.plan_choice import choose_plans

_OF_THIS_TOOL = (CandidateKind.ENGINES, CandidateKind.BUNDLE)
# The pipeline takes its final layer norm from there, also where a plan computes the rest.
_READ_BY_THE_PIPELINE = (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2)


def describe_case(
    folder: Path, manifest: BundleManifest, scene: Scene, scope: Scope, scheduler: str, flops: dict[ComponentName, int]
) -> CaseRecord:
    """The case of a bundle and a scene whose inputs are written."""
    profile = manifest.profile
    return CaseRecord(
        bundle=manifest.name, digest=hash_file(folder / MANIFEST_NAME), family=manifest.family,
        quantization={n: r.quantization for n, r in manifest.components.items() if r.quantization is not None},
        bundle_bytes=sum(file.size_bytes for file in manifest.files.values()),
        width_px=profile.width_px.opt, height_px=profile.height_px.opt, batch=profile.batch.min,
        prompts=scene.prompts, seed=scene.seed, steps=scene.steps, guidance_scale=scene.guidance_scale,
        scheduler=scheduler, scope=scope, loras=scene.loras, inputs_digest=hash_file(scene.inputs), flops=flops,
    )  # fmt: skip


def find_size(candidate: Candidate) -> int | None:
    """Bytes of the files that the candidate reads. None for another tool, whose files are not ours to count.

    Of a quantised bundle torch reads the checkpoint, whose weights count as the manifest gives them.
    """
    match candidate.kind:
        case CandidateKind.PEER:
            return None
        case CandidateKind.TORCH:
            return _sum_for_torch(candidate.manifest)
        case _:
            return _sum_for_engines(candidate.folder, candidate.manifest)


def _sum_for_torch(manifest: BundleManifest) -> int:
    plans = {plan.file for record in manifest.components.values() for plan in record.every_plan}
    quantized = {f"{name}/weights.safetensors": r.quantization for name, r in manifest.components.items()}
    total_bytes = 0
    for path, file in manifest.files.items():
        if path in plans or path.endswith(".onnx"):
            continue
        tried = quantized.get(path)
        total_bytes += file.size_bytes if tried is None else tried.weights_bytes_16bit
    return total_bytes


def _sum_for_engines(folder: Path, manifest: BundleManifest) -> int:
    every = {name: record.plans for name, record in manifest.components.items() if record.plans}
    try:
        chosen = choose_plans(folder, manifest, find_machine())
    except SdoptError:  # no plan runs here, and the candidate's row says so
        chosen = every
    unread = {plan.file for plans in every.values() for plan in plans}
    unread -= {plan.file for plans in chosen.values() for plan in plans}
    for name in every:
        unread.add(f"{name}/model.onnx")
        if name not in _READ_BY_THE_PIPELINE:
            unread.add(f"{name}/weights.safetensors")
    return sum(file.size_bytes for path, file in manifest.files.items() if path not in unread)


def find_build_time(candidate: Candidate) -> int | None:
    """Wall time in ns of the build of its bundle; None for what sdopt did not build, or did not build whole: where a
    stage was found in the store, the rest's time says little.
    """
    build = candidate.manifest.build if candidate.kind in _OF_THIS_TOOL else None
    return None if build is None or build.reused else build.wall_ns


def describe_audits(candidate: Candidate) -> dict[ComponentName, str]:
    """A line for each component of engines that sdopt built; empty for all others."""
    if candidate.kind not in _OF_THIS_TOOL:
        return {}
    return {name: _describe_component(record) for name, record in candidate.manifest.components.items()}


def _describe_component(record: ComponentRecord) -> str:
    audit, parity = record.audit, record.parity
    node = "Attention" if audit.opset >= 23 else "Softmax"
    error = f"{max(output.relative_l2 for output in parity.outputs):.1e}" if parity else "not checked"
    parts = [
        f"{record.precision} on {record.backend.kind}",
        f"opset {audit.opset}, {audit.nodes} nodes, {node} in {audit.attention_nodes} of {audit.attention_layers} "
        "attention layers",
        f"parity error {error}",
    ]
    if record.quantization is not None:
        parts.append(record.quantization.describe())
    return "; ".join([*parts, *(_describe_plan(plan) for plan in {plan.file: plan for plan in record.plans}.values())])


def _describe_plan(plan: PlanRecord) -> str:
    audit = plan.audit
    fused = audit.attention_layers if audit.attention_fused else audit.fused_kernels or 0
    return (
        f"{plan.flavour} {plan.version} for {plan.generation}: attention {audit.attention_native} of "
        f"{audit.attention_layers} native, {fused} fused; {len(audit.other_precision)} layers in another precision; "
        f"{audit.weights_found} of {audit.weights_sampled} sampled weights found"
    )
