"""safetensors files as byte ranges: read strictly, written as a stream, never loaded whole.

The format is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes:
https://huggingface.co/docs/safetensors. sdopt writes one canonical layout, so that two checkpoints of one architecture
get the same offsets, and one ONNX graph fits both.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.errors import CheckpointError, UnsafeInputError
from sdopt.model.precision import DType
from sdopt.weights.dtypes import BY_SAFETENSORS

# The format's own limit; a header of a real checkpoint has some 100 KB.
_HEADER_LIMIT_BYTES = 100_000_000
_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a byte range of a file. `offset_bytes` counts from the start of the file.

    With `transposed`, the file holds the transpose of a matrix of `shape` (OpenCLIP's text projection).
    """

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    offset_bytes: int
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize_bytes


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a file: its tensors by name, and its free-form metadata."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsFile:
    """Read and check a header; the tensors' bytes are not touched.

    Raises `CheckpointError` for a file that is missing, truncated or no safetensors file, and `UnsafeInputError` for
    one whose header contradicts itself: duplicate keys, ranges that overlap, leave holes or pass the end.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is not a safetensors file: it has {len(prefix)} bytes")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(_HEADER_LIMIT_BYTES, size_bytes - 8):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or is truncated: its header should have {header_bytes} bytes",
                    hint=_AGAIN,
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UnsafeInputError(f"{path}: the metadata is not a table of strings")
    start = 8 + header_bytes
    tensors = {name: _parse_entry(path, name, entry, start) for name, entry in header.items()}
    _check_ranges(path, tensors, start, size_bytes)
    return SafetensorsFile(tensors, {str(k): str(v) for k, v in metadata.items()})


def quantised_error(where: object, tensor: str, stored_as: str) -> CheckpointError:
    """What is said of weights that somebody else quantised: their scales and what was lost are not known."""
    return CheckpointError(
        f"{where}: tensor {tensor!r} is stored as {stored_as}: the checkpoint is quantised",
        hint="take the fp16, bf16 or fp32 file of the model; sdopt quantises by itself",
    )


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UnsafeInputError(f"{path}: the key {twice!r} is there twice")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a table")
    return header


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise UnsafeInputError(f"{path}: the entry of tensor {name!r} is malformed")
    if dtype.startswith(("F8", "F6", "F4")) and dtype not in BY_SAFETENSORS:
        raise quantised_error(path, name, dtype)
    if dtype not in BY_SAFETENSORS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the type {dtype}, which Stable Diffusion checkpoints do not use"
        )
    if not all(isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0 for axis in shape):
        raise UnsafeInputError(f"{path}: tensor {name!r} has the shape {shape}", hint=_AGAIN)
    ref = TensorRef(path, BY_SAFETENSORS[dtype], tuple(shape), start + begin)
    if begin < 0 or end - begin != ref.nbytes:
        raise UnsafeInputError(
            f"{path}: tensor {name!r} of shape {shape} should have {ref.nbytes} bytes, not {end - begin}"
        )
    return ref


def _check_ranges(path: Path, tensors: Mapping[str, TensorRef], start: int, size_bytes: int) -> None:
    position = start
    for name, ref in sorted(tensors.items(), key=lambda item: (item[1].offset_bytes, item[1].nbytes)):
        if ref.offset_bytes < position:
            raise UnsafeInputError(f"{path}: tensor {name!r} overlaps the one before it")
        if ref.offset_bytes > position:
            raise UnsafeInputError(
                f"{path}: {ref.offset_bytes - position} unnamed bytes lie before tensor {name!r}", hint=_AGAIN
            )
        position += ref.nbytes
    if position > size_bytes:
        raise CheckpointError(
            f"{path} is truncated: {position} bytes are named and {size_bytes} are there", hint=_AGAIN
        )
    if position < size_bytes:
        raise UnsafeInputError(f"{path}: {size_bytes - position} unnamed bytes lie after the last tensor", hint=_AGAIN)
