"""The machine and the libraries, as manifests and reports record them."""

from __future__ import annotations

import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdopt._version import __version__
from sdopt.artifacts.manifest import EnvironmentRecord

_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
# Those that change which kernels a CPU runtime picks, and so its speed and its rounding.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@cache
def describe_machine() -> EnvironmentRecord:
    cpuinfo = _read_cpuinfo()
    flags = set((re.search(r"^flags\s*:(.*)$", cpuinfo, re.M) or [""])[0].split())
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    return EnvironmentRecord(
        sdopt=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=name[1] if name else platform.processor() or platform.machine(),
        cpu_features=tuple(feature for feature in _FEATURES if feature in flags),
        libraries={library: found for library in _LIBRARIES if (found := find_version(library))},
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
