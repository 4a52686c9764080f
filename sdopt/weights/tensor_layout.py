"""Where each tensor of a weight file lies."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.model.precision import DType
from sdopt.weights.dtypes import DTYPES
from sdopt.weights.safetensors_header import TensorRef

_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class Layout:
    """A canonical file before it is written: the header's bytes and where each tensor will lie."""

    header: bytes
    tensors: Mapping[str, TensorRef]
    size_bytes: int


def plan_layout(path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> Layout:
    """The canonical layout for these names, types and shapes: widest type first, then by name, data on a page.

    It depends on nothing else, so a graph that names its byte ranges fits every checkpoint of the architecture.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize_bytes, tensors[name][0].value, name))
    # transformers refuses a file that does not say in which framework's layout its tensors are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtype.itemsize_bytes
        header[name] = {"dtype": DTYPES[dtype].safetensors, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name], position = position, end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT_BYTES)
    start = 8 + len(raw)
    refs = {name: TensorRef(path, *tensors[name], start + offsets[name]) for name in order}
    return Layout(struct.pack("<Q", len(raw)) + raw, refs, start + position)
