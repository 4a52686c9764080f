"""The machine and the libraries, as manifests and reports record them."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdopt._version import __version__
from sdopt.machine.gpus import Gpu, find_gpus
from sdopt.machine.machine_record import EnvironmentRecord, PlanFlavour

_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt-rtx",
              "tensorrt", "numpy")  # fmt: skip
_FLAVOURS: tuple[PlanFlavour, ...] = ("tensorrt-rtx", "tensorrt")
_CUDA_MAJORS = (13, 12)
# Those that change which kernels a CPU runtime picks, and so its speed and its rounding.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class InstalledLibrary:
    """A TensorRT that is installed: its version, and the CUDA that it was built with, where its package says so."""

    version: str
    cuda_major: int | None = None


@dataclass(frozen=True)
class Machine:
    """What decides whether a plan runs here. The first of `gpus` runs it."""

    system: str
    """As in `Linux x86_64`."""
    gpus: tuple[Gpu, ...] = ()
    libraries: Mapping[PlanFlavour, InstalledLibrary] = field(default_factory=dict)


def find_machine() -> Machine:
    """This machine, from NVML and the installed packages' metadata: no library is imported."""
    libraries = {flavour: found for flavour in _FLAVOURS if (found := _find_tensorrt(flavour))}
    return Machine(describe_system(), find_gpus(), libraries)


def _find_tensorrt(flavour: PlanFlavour) -> InstalledLibrary | None:
    """The package `tensorrt-rtx` only names the one that brings the library, as `tensorrt-rtx-cu13`."""
    for major in _CUDA_MAJORS:
        if found := find_version(f"{flavour}-cu{major}"):
            return InstalledLibrary(found, major)
    found = find_version(flavour)
    return InstalledLibrary(found) if found else None


def describe_system() -> str:
    """Operating system and architecture, as in `Linux x86_64`: what a plan does not leave."""
    return f"{platform.system()} {platform.machine()}"


@cache
def describe_machine() -> EnvironmentRecord:
    cpuinfo = _read_cpuinfo()
    flags = set((re.search(r"^flags\s*:(.*)$", cpuinfo, re.M) or [""])[0].split())
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    return EnvironmentRecord(
        sdopt=__version__,
        python=platform.python_version(),
        system=describe_system(),
        processor=name[1] if name else platform.processor() or platform.machine(),
        cpu_features=tuple(feature for feature in _FEATURES if feature in flags),
        libraries={library: found for library in _LIBRARIES if (found := find_version(library))},
        gpus=tuple(gpu.record for gpu in find_gpus()),
    )


def find_version(library: str) -> str:
    """The installed version, or the empty string. Nothing is imported."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
