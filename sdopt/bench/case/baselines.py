"""What engines are measured against: the words of `--against`, and what each means for torch on this device."""

from __future__ import annotations

import importlib.util
import os
import shutil
from enum import StrEnum
from pathlib import Path

from sdopt.errors import UsageError
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.precision import Precision
from sdopt.model.suggest import suggest


class Baseline(StrEnum):
    """The value is the word on the command line, and the name in reports where it stands for one candidate."""

    EAGER = "eager"
    """torch eager in each precision that is usual on the engines' device."""
    EAGER_FP32 = "eager-fp32"
    EAGER_BF16 = "eager-bf16"
    EAGER_FP16 = "eager-fp16"
    COMPILE = "compile"
    COMPILE_MAX_AUTOTUNE = "compile-max-autotune"
    """torch.compile that times every kernel it could use, with channels-last convolutions."""
    ATTENTION = "attention"
    """torch eager with each kernel of attention that is installed."""
    FLASH_ATTN = "flash-attn"
    """The package of that name."""
    OPTIMUM = "optimum"
    """optimum's ONNX Runtime pipeline, in an environment of its own."""


_FP16 = TorchSettings(device="cuda", precision=Precision.FP16)
_ON_CPU = {
    Baseline.EAGER_FP32: TorchSettings(),
    Baseline.EAGER_BF16: TorchSettings(precision=Precision.BF16),
    Baseline.COMPILE: TorchSettings(compile=True),
    Baseline.COMPILE_MAX_AUTOTUNE: TorchSettings(compile=True, compile_mode="max-autotune", channels_last=True),
}
_ON_GPU = {
    Baseline.EAGER_FP32: TorchSettings(device="cuda"),
    Baseline.EAGER_BF16: TorchSettings(device="cuda", precision=Precision.BF16),
    Baseline.EAGER_FP16: _FP16,
    Baseline.COMPILE: _FP16.model_copy(update={"compile": True, "compile_mode": "default"}),
    Baseline.COMPILE_MAX_AUTOTUNE: _FP16.model_copy(
        update={"compile": True, "compile_mode": "max-autotune", "channels_last": True}
    ),
    Baseline.FLASH_ATTN: _FP16.model_copy(update={"attention": "flash-attn"}),
}
_PACKAGES = {"flash-attn": "flash_attn", "sage": "sageattention", "xformers": "xformers"}
_INSTALL = {"flash-attn": "pip install 'sdopt[baseline]'"}


def usual_baselines(*, on_gpu: bool) -> tuple[str, ...]:
    """What engines are measured against where nothing is asked for.

    On a GPU, what somebody would do who wants torch to be fast; fp32 is what nobody draws with there.
    """
    if on_gpu:
        return (Baseline.EAGER_FP16, Baseline.COMPILE_MAX_AUTOTUNE)
    return (Baseline.EAGER_FP32, Baseline.EAGER_BF16, Baseline.COMPILE)


def parse_against(text: str) -> tuple[str, ...]:
    """`'eager-fp32,compile,out/other'` as words, each once; a word that is not a baseline is a bundle's folder.

    Empty is none. Raises `UsageError` for a word that is neither.
    """
    words = [word for part in text.split(",") if (word := part.strip())]
    for word in words:
        if word not in list(Baseline) and not looks_like_folder(word):
            raise UsageError(
                f"there is no baseline {word!r}",
                hint=suggest(word, Baseline, more=", and the folder of another bundle"),
            )
    return tuple(dict.fromkeys(words))


def looks_like_folder(word: str) -> bool:
    """Whether a word of `--against` names a bundle: by a separator, or because there is one of that name."""
    separators = [each for each in (os.sep, os.altsep) if each]
    return (
        word.startswith(("~", "."))
        or any(each in word for each in separators)
        or (Path(word) / MANIFEST_NAME).is_file()
    )


def list_torch(baseline: Baseline, *, on_gpu: bool) -> dict[str, TorchSettings | None]:
    """Settings of torch by the candidate's name, several for a word that stands for several; None where this device
    cannot have it.
    """
    table = _ON_GPU if on_gpu else _ON_CPU
    match baseline:
        case Baseline.EAGER:
            usual = (Baseline.EAGER_FP16,) if on_gpu else (Baseline.EAGER_FP32, Baseline.EAGER_BF16)
            return {name.value: table[name] for name in usual}
        case Baseline.ATTENTION:
            return _list_kernels(on_gpu=on_gpu)
    return {baseline.value: table.get(baseline)}


def _list_kernels(*, on_gpu: bool) -> dict[str, TorchSettings | None]:
    own = ("math", "flash", "efficient", "cudnn") if on_gpu else ("math", "flash")
    installed = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module)] if on_gpu else []
    eager = _FP16 if on_gpu else TorchSettings()
    names = {each: each if each in list(Baseline) else f"attention-{each}" for each in (*own, *installed)}
    return {name: eager.model_copy(update={"attention": each}) for each, name in names.items()}


def label_torch(settings: TorchSettings) -> str:
    """'torch eager bf16', 'torch.compile max-autotune fp16', 'torch eager fp32, attention math'."""
    how = "torch eager"
    if settings.compile:
        how = "torch.compile max-autotune" if settings.compile_mode == "max-autotune" else "torch.compile"
    kernel = "" if settings.attention == "sdpa" else f", attention {settings.attention}"
    return f"{how} {settings.precision}{kernel}"


def find_missing(name: str, settings: TorchSettings | None) -> str:
    """Why this machine cannot run it, with what would mend it; empty where it can. None settings fit no CPU."""
    if settings is None:
        what = "torch computes in fp16" if name == Baseline.EAGER_FP16 else f"{name} computes"
        return f"{what} on a GPU, and these engines run on the CPU"
    module = _PACKAGES.get(settings.attention)
    if module is not None and importlib.util.find_spec(module) is None:
        remedy = _INSTALL.get(settings.attention, f"pip install {settings.attention}")
        return f"{settings.attention} is not installed: {remedy}"
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if settings.compile and not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler, and there is none: apt-get install g++"
    return ""
