"""Fused attention kernels in a finished plan, from TensorRT's engine inspector; only a GPU can load a plan for it."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from typing import Any

from sdopt.backends.tensorrt.messages import Messages, make_logger

# How TensorRT names its kernels of fused attention: `_gemm_mha_v2`, `fmha_v2_flash_attention_fp16`, `kgen_attention`.
_ATTENTION = re.compile(r"mha|attention|flash", re.IGNORECASE)
_NAMES = ("Name", "LayerType", "TacticName")


def inspect_attention(library: Any, path: Path) -> int | None:
    """Load a plan that this process has just built, and count its attention kernels; None where it cannot be loaded,
    as without a GPU or for another generation's.
    """
    runtime = library.Runtime(make_logger(library, Messages()))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return count_attention_kernels(inspector.get_engine_information(library.LayerInformationFormat.JSON))


def count_attention_kernels(information: str) -> int | None:
    """Of the inspector's JSON, whose `Layers` are tables at detailed verbosity; None where they are names only."""
    layers = json.loads(information).get("Layers", [])
    if not all(isinstance(layer, dict) for layer in layers):
        return None
    return sum(any(is_attention(str(layer.get(key, ""))) for key in _NAMES) for layer in layers)


def is_attention(kernel: str) -> bool:
    """Whether a kernel of this name computes a whole attention layer."""
    return _ATTENTION.search(kernel) is not None
