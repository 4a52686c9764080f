"""The TensorRT module that a kind names, its version, and its messages. The only place that imports one of the two."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Literal

from sdopt.errors import MissingDependency

Kind = Literal["tensorrt-rtx", "tensorrt"]

_MODULES: dict[Kind, tuple[str, str]] = {"tensorrt-rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "gpu")}


@cache
def load_library(kind: Kind) -> Any:
    """The module; both have the same names. Raises `MissingDependency` with the extra that brings it."""
    module, extra = _MODULES[kind]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: the module is there, and a CUDA library that it loads is not
        raise MissingDependency.of(kind, extra=extra) from error


def buildable_generations(kind: Kind) -> tuple[str, ...]:
    """GPU generations that this version builds plans for without having one, as `sm89`; none for general TensorRT."""
    if kind == "tensorrt":
        return ()
    names = load_library(kind).ComputeCapability.__members__
    found = [name.lower() for name in names if name.startswith("SM")]
    return tuple(sorted(found, key=lambda name: int(name[2:])))
