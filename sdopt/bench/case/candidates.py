"""Who is measured: the bundle's engines, torch on the same weights in several ways, other bundles, and a peer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from sdopt.bench.case.baselines import (
    Baseline,
    find_missing,
    label_torch,
    list_torch,
    parse_against,
    usual_baselines,
)
from sdopt.bench.case.report import CandidateKind
from sdopt.bundle.again import variant_command
from sdopt.bundle.damage import require_pipeline
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import BundleManifest, read_config, read_manifest
from sdopt.bundle.records import ComponentRecord
from sdopt.errors import UsageError
from sdopt.fidelity.candidate import engines_use_gpu
from sdopt.fidelity.picture_limits import least_precision
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
)
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraUse
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import Scheme
from sdopt.model.task import Task
from sdopt.preflight.runnable import require_sound, require_trusted

__all__ = ["ENGINES", "Baseline", "Candidate", "label_engines", "list_candidates", "parse_against"]

ENGINES = "engines"
WITHOUT_LORAS = "without-loras"
_PEER_PACKAGES = ("optimum-onnx==0.1.0", "'onnxruntime>=1.23'", "'diffusers<0.36'", "'torch>=2.10,<2.14'", "accelerate")


@dataclass(frozen=True)
class Candidate:
    """One way to draw the scene. `settings` of None are the engines as its own manifest names them.

    `name` is unique in a run and safe as a file's name. `folder` and `manifest` are those of the bundle that it opens:
    the measured one, except for another bundle's engines. `precision` is the coarsest that it computes in. `python` is
    the interpreter of a peer's own environment. `missing` says why it cannot run here.
    """

    name: str
    label: str
    precision: Precision
    settings: BackendSettings | None
    folder: Path
    manifest: BundleManifest
    kind: CandidateKind
    python: Path | None = None
    missing: str = ""
    fills: bool = True
    """Whether the scene's LoRAs are put on when it is opened: not on a bundle that has them in its weights."""
    alike: bool = True
    """Whether it is asked for the same pictures as the others. The engines without the LoRAs are there for their time.
    """

    def settings_by_component(self) -> dict[ComponentName, BackendSettings]:
        """What each component runs on; empty for a peer, whose settings are not ours."""
        if self.kind is CandidateKind.PEER:
            return {}
        return {name: self.settings or record.backend for name, record in self.manifest.components.items()}

    def precision_by_component(self) -> dict[ComponentName, Precision]:
        """What the products of each component compute in; empty for a peer."""
        if self.kind is CandidateKind.PEER:
            return {}
        if isinstance(self.settings, TorchSettings):
            return dict.fromkeys(self.manifest.components, self.settings.precision)
        return {name: _find_precision(record) for name, record in self.manifest.components.items()}


def list_candidates(
    folder: Path,
    manifest: BundleManifest,
    against: tuple[str, ...] | None,
    peer_python: Path | None = None,
    trust_engines: tuple[str, ...] = (),
    loras: tuple[LoraUse, ...] = (),
) -> tuple[Candidate, ...]:
    """The engines first, then what was asked for in that order, as `parse_against` gives it; None asks for the usual
    baselines.

    With `loras` the engines without them come second, so that what the slots cost is a figure, and another bundle is
    one that has just these in its weights, or slots for them.

    Other bundles are checked as the measured one is: raises `ArtifactError` for one that is damaged, and
    `UnsafeInputError` for plans that nobody vouched for. Raises `UsageError` for one bundle twice.
    """
    engines = Candidate(
        ENGINES, label_engines(manifest), least_precision(manifest), None, folder, manifest, CandidateKind.ENGINES
    )
    found = {ENGINES: engines}
    if loras:
        _require_slots(folder, manifest)
        label = f"{engines.label} without LoRAs"
        found[ENGINES] = replace(engines, label=f"{engines.label} with LoRAs in slots")
        found[WITHOUT_LORAS] = replace(
            engines, name=WITHOUT_LORAS, label=label, kind=CandidateKind.BUNDLE, fills=False, alike=False
        )
    folders = {folder.resolve()}
    for word in usual_baselines(on_gpu=engines_use_gpu(manifest)) if against is None else against:
        if word == Baseline.OPTIMUM:
            found.setdefault(word, _make_peer(engines, peer_python))
        elif word in list(Baseline):
            for each in _make_torch(engines, Baseline(word)):
                found.setdefault(each.name, each)
        else:
            other = Path(word).expanduser()
            if other.resolve() in folders:
                raise UsageError(f"{other} is measured twice", hint="name each bundle once")
            folders.add(other.resolve())
            bundle = _open_bundle(engines, other, trust_engines)
            if loras:
                bundle = _hold_loras(bundle, loras)
            unique = _make_unique(bundle.name, found)
            found[unique] = replace(bundle, name=unique)
    return tuple(found.values())


def _make_torch(engines: Candidate, baseline: Baseline) -> list[Candidate]:
    on_gpu = engines_use_gpu(engines.manifest)
    made = []
    for name, settings in list_torch(baseline, on_gpu=on_gpu).items():
        # What this device cannot have is still a row, and says what it would be.
        shown = settings or list_torch(baseline, on_gpu=True)[name] or TorchSettings()
        made.append(
            replace(
                engines, name=name, label=label_torch(shown), precision=shown.precision, settings=shown,
                kind=CandidateKind.TORCH, missing=find_missing(name, settings),
            )
        )  # fmt: skip
    return made


def _open_bundle(engines: Candidate, folder: Path, trust_engines: tuple[str, ...]) -> Candidate:
    folder = open_links(folder)
    manifest = read_manifest(folder)
    require_pipeline(folder, manifest)
    require_sound(folder, manifest)
    require_trusted(folder, manifest, trust_engines)
    return Candidate(
        f"bundle-{_make_safe(folder.resolve().name)}", f"{label_engines(manifest)} of {folder.resolve().name}",
        least_precision(manifest), None, folder, manifest, CandidateKind.BUNDLE,
        missing=_find_difference(engines, folder, manifest),
    )  # fmt: skip


def _require_slots(folder: Path, manifest: BundleManifest) -> None:
    if all(record.lora_slots is None for record in manifest.components.values()):
        raise UsageError(
            f"{folder.name} has no LoRA slots, so that nothing can be measured with a LoRA in them",
            hint=f"build it with slots: {variant_command('--lora-slots 64', folder)}",
        )


def _hold_loras(bundle: Candidate, loras: tuple[LoraUse, ...]) -> Candidate:
    """Another bundle beside engines with these LoRAs."""
    baked = [(each.sha256, each.unet, each.text) for each in bundle.manifest.source.adapters]
    if baked == [(use.sha256, use.unet, use.text) for use in loras]:
        return replace(bundle, fills=False, label=f"{bundle.label} with LoRAs in its weights")
    if baked:
        other = ", ".join(each.name for each in bundle.manifest.source.adapters)
        return replace(bundle, missing=f"it has other LoRAs in its weights, or with other weights: {other}")
    if all(record.lora_slots is None for record in bundle.manifest.components.values()):
        return replace(bundle, missing="it has neither slots nor these LoRAs in its weights")
    return replace(bundle, label=f"{bundle.label} with LoRAs in slots")


def _find_difference(engines: Candidate, folder: Path, manifest: BundleManifest) -> str:
    """Why a bundle cannot draw the scene of the measured one; empty where it can."""
    mine, its = (_describe_task(*each) for each in ((engines.folder, engines.manifest), (folder, manifest)))
    parts = [f"{name} {its[name]}, not {mine[name]}" for name in mine if mine[name] != its[name]]
    return f"it draws something else than the measured bundle: {'; '.join(parts)}" if parts else ""


def _describe_task(folder: Path, manifest: BundleManifest) -> dict[str, str]:
    config, profile = read_config(folder, ComponentName.VAE_DECODER), manifest.profile
    return {
        "family": manifest.family + (" inpainting" if manifest.own_task is Task.INPAINT else ""),
        "picture size": f"{profile.width_px.opt}x{profile.height_px.opt}",
        "batch": str(profile.batch.min),
        "latents": f"{config['latent_channels']} channels at 1/{manifest.require_pixels_per_latent()}",
    }


def _make_peer(engines: Candidate, python: Path | None) -> Candidate:
    manifest = engines.manifest
    dtypes = {t.dtype for r in manifest.components.values() for t in r.spec.inputs if t.dtype.is_float}
    on_gpu = engines_use_gpu(manifest)
    missing = ""
    if python is None:
        missing = (
            "optimum lives in an environment of its own, for it pins an old transformers: python -m venv optimum-venv "
            f"&& optimum-venv/bin/pip install {' '.join(_PEER_PACKAGES)}, then --peer-python optimum-venv/bin/python"
        )
    elif manifest.own_task is not Task.TEXT_TO_IMAGE:
        missing = "optimum is measured from text to image alone, and this bundle starts from a picture"
    elif DType.BF16 in dtypes:
        missing = (
            "ONNX Runtime does not compute the bf16 graphs of these engines: convert with --precision fp16 or fp32"
        )
    precision = Precision.FP16 if DType.FP16 in dtypes else Precision.FP32
    provider = " CUDA" if on_gpu else ""
    return replace(
        engines, name=Baseline.OPTIMUM.value, label=f"optimum ONNX Runtime{provider} {precision}", precision=precision,
        kind=CandidateKind.PEER, python=python, missing=missing,
    )  # fmt: skip


def _make_safe(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.")[:40] or "other"


def _make_unique(name: str, taken: dict[str, Candidate]) -> str:
    count, unique = 1, name
    while unique in taken:
        count += 1
        unique = f"{name}-{count}"
    return unique


def _find_precision(record: ComponentRecord) -> Precision:
    """In 8 bits where the runtime's execution graph shows most quantised layers so, and by their scheme where it shows
    none: weights alone are widened before some products, and of others the runtime rounds the inputs by itself.
    """
    tried = record.quantization if record.is_quantized else None
    if tried is None:
        return record.precision
    scheme, shown = tried.settings.scheme, tried.integer_layers
    if not (scheme.quantizes_activations if shown is None else 2 * shown > tried.quantized_layers):
        return record.precision
    return Precision.FP8 if scheme is Scheme.FP8 else Precision.INT8


def label_engines(manifest: BundleManifest) -> str:
    """'OpenVINO bf16', or with several kinds 'OpenVINO bf16 + ONNX Runtime fp32', that of the UNet first.

    'OpenVINO bf16 with int8' where layers of the UNet are quantised, by their scheme.
    """
    records = sorted(manifest.components.items(), key=lambda item: item[0] is not ComponentName.UNET)
    names = (f"{_label_runtime(record.backend)} {record.precision}" for _, record in records)
    label = " + ".join(dict.fromkeys(names))
    unet = manifest.components.get(ComponentName.UNET)
    if unet is None or unet.quantization is None or not unet.is_quantized:
        return label
    return f"{label} with {unet.quantization.settings.scheme}"


def _label_runtime(settings: BackendSettings) -> str:
    match settings:
        case OpenVINOSettings():
            return "OpenVINO"
        case OnnxRuntimeSettings():
            return "ONNX Runtime CUDA" if settings.device == "cuda" else "ONNX Runtime"
        case TensorRTSettings():
            return "TensorRT-RTX" if settings.kind == "tensorrt-rtx" else "TensorRT"
        case TorchSettings():
            return "torch"
