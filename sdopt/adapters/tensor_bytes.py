"""The numbers of tensors, as fp32, from a file that is opened once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter_file import FileLayer
from sdopt.errors import AdapterError
from sdopt.weights.dtypes import numpy_dtype
from sdopt.weights.safetensors_header import TensorRef

Array = npt.NDArray[np.float32]
_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileHashes:
    """SHA-256, 64 hex digits: of the file, and of what lies behind its header (AutoV3), which stays the same where
    somebody edits the metadata. Empty where a file is not .safetensors.
    """

    file: str
    tensors: str


class TensorReader:
    """Tensors of one file, one at a time through one buffer, so that only what is kept takes memory.

    Nothing is mapped: a file that is cut short while it is mapped would end the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise AdapterError(f"cannot read {path}: {error.strerror}") from error
        self._buffer = np.empty(0, np.uint8)
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def read(self, ref: TensorRef) -> Array:
        """A new fp32 array of the tensor's shape. Raises `AdapterError` where the file has become shorter."""
        if len(self._buffer) < ref.nbytes:
            self._buffer = np.empty(ref.nbytes, np.uint8)
        data = self._buffer[: ref.nbytes]
        if os.preadv(self._file.fileno(), [data.data], ref.offset_bytes) != ref.nbytes:
            raise AdapterError(f"{self._path} was changed while it was read", hint="try again when it has been written")
        wide: Array = data.view(numpy_dtype(ref.dtype)).astype(np.float32)
        return wide.reshape(ref.shape[::-1]).T if ref.transposed else wide.reshape(ref.shape)

    def read_layer(self, layer: FileLayer) -> dict[str, Array]:
        """The tensors of a layer by their part."""
        return {part: self.read(ref) for part, ref in layer.parts.items()}

    def start_hash(self) -> Future[FileHashes]:
        """Found beside the reading: hashlib lets other threads run."""
        return self._pool.submit(self._hash)

    def _hash(self) -> FileHashes:
        whole, tensors = hashlib.sha256(), hashlib.sha256()
        buffer, at, header_bytes = bytearray(_HASH_CHUNK_BYTES), 0, 0
        while count := os.preadv(self._file.fileno(), [buffer], at):
            data = memoryview(buffer)[:count]
            whole.update(data)
            if at == 0:
                header_bytes = 8 + int.from_bytes(data[:8], "little")
            tensors.update(data[max(0, header_bytes - at) :])
            at += count
        return FileHashes(whole.hexdigest(), tensors.hexdigest() if self._path.suffix == ".safetensors" else "")


def read_tensor(ref: TensorRef) -> Array:
    """One tensor of any file, as fp32."""
    with TensorReader(ref.file) as reader:
        return reader.read(ref)


def require_finite(path: Path, layer: str, arrays: Mapping[str, Array]) -> None:
    """Raise `AdapterError` where one of them has NaN or infinity."""
    for array in arrays.values():
        flat = array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            # Ten times as fast as looking at each; what overflows in the sum of squares is looked at.
            finite = np.isfinite(flat @ flat) or np.isfinite(flat).all()
        if not finite:
            raise AdapterError(
                f"{path} has NaN or infinity in {layer}: its training failed", hint="take another file of the adapter"
            )
