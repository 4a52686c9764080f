"""The weight file of a component: the checkpoint's tensors in the canonical layout, and the graph bound to it.

An ONNX file may name any file beside it as external data, with an offset and a length. A safetensors file therefore
serves as the weight file of the graph: one copy, one hash, readable by every tool. Weights are streamed: memory stays
at a few buffers whatever the model's size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdopt import progress
from sdopt.disk.digest import digest_of
from sdopt.disk.files import disk_errors
from sdopt.errors import CheckpointError
from sdopt.model.precision import DType
from sdopt.weights.dtypes import numpy_dtype
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.tensor_layout import plan_layout

_CHUNK_BYTES = 16 << 20

Bytes = npt.NDArray[np.uint8]


def storage_dtype(source: DType, graph: DType) -> DType:
    """What a weight is kept in: its own 16 bits under an fp32 graph (casting up loses nothing), else the graph's."""
    if graph is DType.FP32 and source in (DType.FP16, DType.BF16):
        return source
    return graph


def storage_layout(tensors: Mapping[str, TensorRef], graph: DType) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Type and shape of every tensor of the weight file of a graph of float type `graph`."""
    return {
        name: (storage_dtype(ref.dtype, graph) if ref.dtype.is_float else ref.dtype, ref.shape)
        for name, ref in tensors.items()
    }


def identify_weights(tensors: Mapping[str, TensorRef], graph: DType) -> str:
    """Digest of what the bytes of a weight file depend on, without reading them: the sources as the disk knows them."""
    return digest_of([_identify(name, ref, graph) for name, ref in sorted(tensors.items())])


def _identify(name: str, ref: TensorRef, graph: DType) -> list[Any]:
    state = ref.file.stat()
    return [
        name, str(ref.file), state.st_size, state.st_mtime_ns, ref.offset_bytes, ref.dtype, list(ref.shape),
        ref.transposed, graph,
    ]  # fmt: skip


@dataclass(frozen=True)
class WrittenWeights:
    sha256: str
    size_bytes: int


def write_weights(path: Path, tensors: Mapping[str, TensorRef], graph: DType, *, label: str) -> WrittenWeights:
    """Write `path` in the canonical layout, converted to the storage types, and hash it on the way.

    Raises `CheckpointError` for a NaN, an infinity, a truncated source, or a value that the storage type cannot hold.
    """
    layout = plan_layout(path, storage_layout(tensors, graph))
    digest = hashlib.sha256(layout.header)
    written = len(layout.header)
    with disk_errors(path), path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        file.write(layout.header)
        hashing: Future[None] | None = None
        for chunk in _stream(tensors, {name: ref.dtype for name, ref in layout.tensors.items()}):
            if hashing is not None:
                hashing.result()
            hashing = hasher.submit(digest.update, chunk.data)
            _write_all(file.fileno(), chunk)
            written += chunk.nbytes
            progress.update(label, written / layout.size_bytes)
        if hashing is not None:
            hashing.result()
        os.fsync(file.fileno())
    return WrittenWeights(digest.hexdigest(), layout.size_bytes)


def _write_all(descriptor: int, chunk: Bytes) -> None:
    view = chunk.data
    while view:
        view = view[os.write(descriptor, view) :]


def _stream(tensors: Mapping[str, TensorRef], kept: Mapping[str, DType]) -> Iterator[Bytes]:
    """The bytes of the weight file after its header, in order."""
    runs = groupby(_find_runs(tensors, kept), key=lambda item: item[0])
    for _, items in runs:
        names = [name for _, name in items]
        first = tensors[names[0]]
        if first.transposed or first.dtype is not kept[names[0]]:
            yield _convert(names[0], first, kept[names[0]])
        else:
            yield from _copy_run(names, tensors)


def _find_runs(tensors: Mapping[str, TensorRef], kept: Mapping[str, DType]) -> Iterator[tuple[int, str]]:
    """Number the tensors so that neighbours which lie side by side in one source file share a number."""
    run, file, end, before = 0, Path(), -1, None
    for name, dtype in kept.items():
        ref = tensors[name]
        plain = not ref.transposed and ref.dtype is dtype
        # A run has one type: its bytes are searched for NaN as that type.
        if not (plain and ref.file == file and ref.offset_bytes == end and dtype is before):
            run += 1
        file, end, before = ref.file, ref.offset_bytes + ref.nbytes if plain else -1, dtype
        yield run, name


def _copy_run(names: list[str], tensors: Mapping[str, TensorRef]) -> Iterator[Bytes]:
    first, dtype = tensors[names[0]], tensors[names[0]].dtype
    remaining = sum(tensors[name].nbytes for name in names)
    with first.file.open("rb", buffering=0) as file:
        file.seek(first.offset_bytes)
        while remaining:
            # A chunk ends on a whole element: 16 MiB is a multiple of every item size.
            buffer = np.empty(min(_CHUNK_BYTES, remaining), np.uint8)
            _read_exactly(file.fileno(), buffer, first.file)
            if not _is_finite(buffer, dtype):
                raise _find_nonfinite(names, tensors)
            remaining -= buffer.nbytes
            yield buffer


def _read_exactly(descriptor: int, buffer: Bytes, file: Path) -> None:
    view, filled = buffer.data, 0
    while filled < len(view):
        count = os.readv(descriptor, [view[filled:]])
        if not count:
            raise CheckpointError(f"{file} is truncated", hint="copy or download it again")
        filled += count


def _is_finite(data: Bytes, dtype: DType) -> bool:
    if not dtype.is_float:
        return True
    # The bits of infinity are an exponent of ones alone, which nothing but infinity and NaN has.
    infinity = np.array(np.inf, numpy_dtype(dtype)).view(f"u{dtype.itemsize_bytes}")
    bits = data.view(infinity.dtype)
    return not bits.size or bool(np.bitwise_and(bits, infinity).max() != infinity)


def _find_nonfinite(names: list[str], tensors: Mapping[str, TensorRef]) -> CheckpointError:
    for name in names:
        if not _is_finite(_read(tensors[name]), tensors[name].dtype):
            return CheckpointError(
                f"the tensor {name!r} of {tensors[name].file} holds NaN or infinity",
                hint="the checkpoint is damaged: download it again, or take another merge",
            )
    return CheckpointError(f"{tensors[names[0]].file} changed while it was read")


def _read(ref: TensorRef) -> Bytes:
    buffer = np.empty(ref.nbytes, np.uint8)
    with ref.file.open("rb", buffering=0) as file:
        file.seek(ref.offset_bytes)
        _read_exactly(file.fileno(), buffer, ref.file)
    return buffer


def _convert(name: str, ref: TensorRef, dtype: DType) -> Bytes:
    raw = _read(ref)
    if not _is_finite(raw, ref.dtype):
        raise _find_nonfinite([name], {name: ref})
    if ref.transposed:
        itemsize = ref.dtype.itemsize_bytes
        stored = raw.reshape(*reversed(ref.shape), itemsize)
        raw = np.ascontiguousarray(stored.transpose(1, 0, 2)).reshape(-1)
    if ref.dtype is dtype:
        return raw
    result = _from_float(_as_float(raw, ref.dtype, name), dtype)
    if not _is_finite(result, dtype):
        raise CheckpointError(
            f"the tensor {name!r} holds values that {dtype} cannot", hint="convert with --precision fp32 or bf16"
        )
    return result


def _from_float(values: npt.NDArray[Any], dtype: DType) -> Bytes:
    """The nearest values of `dtype`, ties to even; infinity for what is too large."""
    with np.errstate(over="ignore"):
        return values.astype(numpy_dtype(dtype)).view(np.uint8).reshape(-1)


def _as_float(raw: Bytes, dtype: DType, name: str) -> npt.NDArray[Any]:
    if not dtype.is_float:
        raise CheckpointError(f"the tensor {name!r} has the type {dtype}, and a float is needed")
    return raw.view(numpy_dtype(dtype))
