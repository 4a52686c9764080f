"""Installed packages that do not fit each other, by their versions alone: nothing is imported.

Such a pair fails far from its cause. With a torchvision that was built for another torch, transformers says "Could not
import module 'BloomPreTrainedModel'", and nothing says torchvision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Mismatch:
    """`sentence` names both packages and versions; `command` mends it."""

    sentence: str
    command: str


def find_mismatches(find: Callable[[str], str] = version) -> list[Mismatch]:
    """Every known pair that does not fit. `find` gives a package's version or raises `PackageNotFoundError`."""
    found = [_check_torch_companion(find, "torchvision", 15), _check_torch_companion(find, "torchaudio", 0)]
    return [each for each in (*found, _check_onnxruntime(find)) if each is not None]


# What an import says that fails by a companion of another torch.
_SIGNS = ("operator torchvision::", "torchvision::nms", "Could not import module '", "undefined symbol")


def explain_failure(text: str, find: Callable[[str], str] = version) -> Mismatch | None:
    """The companion of torch that an import's failure points at, where one that does not fit is installed."""
    if not any(sign in text for sign in _SIGNS):
        return None
    companions = (_check_torch_companion(find, "torchvision", 15), _check_torch_companion(find, "torchaudio", 0))
    return next((each for each in companions if each is not None), None)


def _version_of(find: Callable[[str], str], package: str) -> tuple[str, int, int] | None:
    """(the version as it is written, its first number, its second)."""
    try:
        said = find(package)
    except PackageNotFoundError:
        return None
    # None of a package that was half removed, whatever the annotation says.
    numbers = re.match(r"(\d+)\.(\d+)", said or "")
    return (said, int(numbers[1]), int(numbers[2])) if numbers else None


def _check_torch_companion(find: Callable[[str], str], package: str, offset: int) -> Mismatch | None:
    """torch 2.N goes with torchvision 0.(N + 15) and torchaudio 2.N: https://pytorch.org/get-started/previous-versions."""
    torch, companion = _version_of(find, "torch"), _version_of(find, package)
    if torch is None or companion is None or torch[1] != 2:
        return None
    wanted = (0, torch[2] + offset) if offset else (torch[1], torch[2])
    if companion[1:] == wanted:
        return None
    return Mismatch(
        f"{package} {companion[0]} does not fit torch {torch[0]}, which goes with {package} {wanted[0]}.{wanted[1]}",
        f"pip uninstall -y {package}   # sdopt does not need it; or pip install '{package}=={wanted[0]}.{wanted[1]}.*'",
    )


def _check_onnxruntime(find: Callable[[str], str]) -> Mismatch | None:
    cpu, gpu = _version_of(find, "onnxruntime"), _version_of(find, "onnxruntime-gpu")
    if cpu is None or gpu is None:
        return None
    return Mismatch(
        f"onnxruntime {cpu[0]} and onnxruntime-gpu {gpu[0]} are both installed, and each overwrites the other's files",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'sdopt[gpu]'   # or 'sdopt[cpu]' without a GPU",
    )
