"""Who is measured: the bundle's engines, and torch on the same weights in several ways."""

from __future__ import annotations

import difflib
import os
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sdopt.artifacts.manifest import BundleManifest
from sdopt.bench.report import CandidateKind
from sdopt.errors import UsageError
from sdopt.fidelity.candidate import engines_use_gpu
from sdopt.fidelity.verdict import least_precision
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings, TensorRTSettings, TorchSettings

ENGINES = "engines"


class Baseline(StrEnum):
    """What engines are measured against; the value is its name on the command line and in reports."""

    EAGER_FP32 = "eager-fp32"
    EAGER_BF16 = "eager-bf16"
    EAGER_FP16 = "eager-fp16"
    COMPILE = "compile"


# On a GPU, what somebody would do who wants torch to be fast; fp32 is what nobody draws with there.
_ON_CPU = {
    Baseline.EAGER_FP32: TorchSettings(),
    Baseline.EAGER_BF16: TorchSettings(precision=Precision.BF16),
    Baseline.COMPILE: TorchSettings(compile=True),
}
_ON_GPU = {
    Baseline.EAGER_FP16: TorchSettings(device="cuda", precision=Precision.FP16),
    Baseline.COMPILE: TorchSettings(device="cuda", precision=Precision.FP16, compile=True),
    Baseline.EAGER_FP32: TorchSettings(device="cuda"),
    Baseline.EAGER_BF16: TorchSettings(device="cuda", precision=Precision.BF16),
}


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

    def settings_by_component(self) -> dict[ComponentName, BackendSettings]:
        """What each component runs on; empty for a peer, whose settings are not ours."""
        if self.kind is CandidateKind.PEER:
            return {}
        return {name: self.settings or record.backend for name, record in self.manifest.components.items()}


def usual_baselines(manifest: BundleManifest) -> tuple[Baseline, ...]:
    """What engines are measured against where nothing is asked for."""
    return (Baseline.EAGER_FP16, Baseline.COMPILE) if engines_use_gpu(manifest) else tuple(_ON_CPU)


def list_candidates(
    folder: Path, manifest: BundleManifest, against: tuple[str, ...] | None, peer_python: Path | None = None
) -> tuple[Candidate, ...]:
    """The engines first, then what was asked for in that order, as `parse_against` gives it; None asks for the usual
    baselines.
    """
    del peer_python
    engines = Candidate(
        ENGINES, label_engines(manifest), least_precision(manifest), None, folder, manifest, CandidateKind.ENGINES
    )
    chosen = usual_baselines(manifest) if against is None else tuple(Baseline(word) for word in against)
    return (engines, *(_make_baseline(baseline, folder, manifest) for baseline in chosen))


def _make_baseline(baseline: Baseline, folder: Path, manifest: BundleManifest) -> Candidate:
    settings = _ON_GPU[baseline] if engines_use_gpu(manifest) else _ON_CPU.get(baseline)
    if settings is None:
        return Candidate(
            baseline.value, "torch eager fp16", Precision.FP16, TorchSettings(precision=Precision.FP16), folder,
            manifest, CandidateKind.TORCH,
            missing="torch computes in fp16 on a GPU, and these engines run on the CPU",
        )  # fmt: skip
    label = f"{_label_runtime(settings)} {settings.precision}"
    return Candidate(
        baseline.value, label, settings.precision, settings, folder, manifest, CandidateKind.TORCH,
        missing=_find_missing(baseline),
    )  # fmt: skip


def parse_against(text: str) -> tuple[str, ...]:
    """`'eager-fp32,compile'` as baselines, each once. Empty is none. Raises `UsageError` for an unknown
    one.
    """
    chosen: dict[Baseline, None] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in list(Baseline):
            near = difflib.get_close_matches(word, [baseline.value for baseline in Baseline], n=1)
            known = f"known: {', '.join(Baseline)}"
            raise UsageError(
                f"there is no baseline {word!r}", hint=f"did you mean {near[0]!r}? {known}" if near else known
            )
        chosen[Baseline(word)] = None
    return tuple(chosen)


def label_engines(manifest: BundleManifest) -> str:
    """'OpenVINO bf16', or with several kinds 'OpenVINO bf16 + ONNX Runtime fp32', that of the UNet first."""
    records = sorted(manifest.components.items(), key=lambda item: item[0] is not ComponentName.UNET)
    names = (f"{_label_runtime(record.backend)} {record.precision}" for _, record in records)
    return " + ".join(dict.fromkeys(names))


def _label_runtime(settings: BackendSettings) -> str:
    match settings:
        case OpenVINOSettings():
            return "OpenVINO"
        case OnnxRuntimeSettings():
            return "ONNX Runtime CUDA" if settings.device == "cuda" else "ONNX Runtime"
        case TensorRTSettings():
            return "TensorRT-RTX" if settings.kind == "tensorrt-rtx" else "TensorRT"
        case TorchSettings():
            return "torch.compile" if settings.compile else "torch eager"


def _find_missing(baseline: Baseline) -> str:
    if baseline is not Baseline.COMPILE:
        return ""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if any(shutil.which(name) for name in compilers if name):
        return ""
    return "torch.compile needs a C++ compiler, and there is none: apt-get install g++"
