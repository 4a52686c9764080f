"""Are the weights in the plan? Some of them are looked for, byte for byte, while the plan is written.

A plan holds most weights as the graph has them, or with the axes of a matrix or of a convolution in another order.
Those that another operation was folded into (attention's scale goes into the projections of queries and keys) are not
found; so a share is judged, not each. Nothing is folded into quantised weights, which are looked for and judged apart:
a plan that lost them alone would else pass where few layers are quantised. TensorRT-RTX compiles where it runs and
keeps weights plain; general TensorRT may rearrange them for its kernels, and is not judged by this.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from sdopt.model.precision import DType
from sdopt.weights.dtypes import DTYPES, numpy_dtype

_SAMPLES = 16
_WINDOW_ELEMENTS = 24
# Of numbers of one byte or less: as many bytes as tell one weight from another.
_WINDOW_ELEMENTS_8BIT, _WINDOW_ELEMENTS_4BIT = 32, 48
# A window with fewer different bytes (zeros, ones of a norm) could be anywhere.
_LEAST_DISTINCT_BYTES = 12
_WORD_BYTES = 8
_NUMPY = {
    DTYPES[dtype].onnx: numpy_dtype(dtype) for dtype in (DType.FP32, DType.FP16, DType.BF16, DType.INT8, DType.FP8)
} | {onnx.TensorProto.INT4: numpy_dtype(DType.UINT8)}
_WINDOWS = {
    onnx.TensorProto.INT8: _WINDOW_ELEMENTS_8BIT, onnx.TensorProto.FLOAT8E4M3FN: _WINDOW_ELEMENTS_8BIT,
    onnx.TensorProto.INT4: _WINDOW_ELEMENTS_4BIT,
}  # fmt: skip

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class WeightRange:
    """A weight of the graph: where its bytes are in the weight file, and what they are."""

    name: str
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]
    is_widened: bool = False
    """The graph casts it to fp32, which the plan may have done."""

    @property
    def window(self) -> int:
        """How many of its numbers are looked for."""
        return _WINDOWS.get(self.data_type, _WINDOW_ELEMENTS)

    @property
    def is_quantized(self) -> bool:
        return self.data_type in _WINDOWS


class WeightSearch:
    """Feed the plan's pieces in order; `found` of `sampled` weights were in them, and so of the quantised among them.

    Plans align weights to eight bytes at least, so one look at the words of a piece finds all patterns at once. Should
    a version of TensorRT align them otherwise, `search_everywhere` finds them more slowly.
    """

    def __init__(self, weights: Sequence[WeightRange], data: Array) -> None:
        picked = [*_pick([w for w in weights if not w.is_quantized]), *_pick([w for w in weights if w.is_quantized])]
        self._wanted = {w.name: patterns for w in picked if (patterns := tuple(_patterns(w, data)))}
        self._quantized = {w.name for w in picked if w.is_quantized} & self._wanted.keys()
        self._longest = max((len(p) for patterns in self._wanted.values() for p in patterns), default=1)
        self._tail = b""
        self._offset = 0
        self.sampled = len(self._wanted)

    @property
    def found(self) -> int:
        return self.sampled - len(self._wanted)

    @property
    def quantized_sampled(self) -> int:
        return len(self._quantized)

    @property
    def quantized_found(self) -> int:
        return len(self._quantized - self._wanted.keys())

    def feed(self, piece: bytes) -> None:
        hits = self._search_words(piece, -self._offset % _WORD_BYTES)
        # A window may lie across two pieces.
        edge = self._tail + piece[: self._longest]
        hits |= {name for name, patterns in self._wanted.items() if any(pattern in edge for pattern in patterns)}
        self._wanted = {name: patterns for name, patterns in self._wanted.items() if name not in hits}
        self._tail = (self._tail + piece[-self._longest :])[-self._longest :]
        self._offset += len(piece)

    def _search_words(self, piece: bytes, start: int) -> set[str]:
        """Names of the weights with a pattern at `start` of a piece or a multiple of eight bytes after it."""
        by_beginning: dict[int, list[tuple[str, bytes]]] = {}
        for name, patterns in self._wanted.items():
            for pattern in patterns:
                by_beginning.setdefault(int.from_bytes(pattern[:2], "little"), []).append((name, pattern))
        words = (len(piece) - start) // _WORD_BYTES
        if words <= 0:
            return set()
        halves = np.frombuffer(piece, "<u2", words * 4, start)
        beginnings, seconds = halves[::4], halves[1::4]
        places = np.flatnonzero(_is_one_of(by_beginning)[beginnings])
        # Few numbers of eight bits are common, and so are pairs of them.
        second = {int.from_bytes(pattern[2:4], "little") for each in by_beginning.values() for _, pattern in each}
        places = places[_is_one_of(second)[seconds[places]]]
        hits: set[str] = set()
        for index in places:
            place = start + int(index) * _WORD_BYTES
            hits |= {name for name, p in by_beginning[int(beginnings[index])] if piece.startswith(p, place)}
        return hits

    def search_everywhere(self, data: mmap.mmap) -> None:
        """Look for what is still missing at every byte of the finished plan."""
        self._wanted = {
            name: patterns
            for name, patterns in self._wanted.items()
            if not any(data.find(pattern, 0) >= 0 for pattern in patterns)
        }


def _is_one_of(numbers: Iterable[int]) -> Array:
    """Of each number of 16 bits, whether it is among these."""
    table = np.zeros(1 << 16, np.bool_)
    table[list(numbers)] = True
    return table


def _pick(weights: Sequence[WeightRange]) -> list[WeightRange]:
    """Matrices and kernels, spread evenly over all of their bytes."""
    large = [w for w in weights if len(w.shape) >= 2 and w.data_type in _NUMPY and min(w.shape[:2]) >= w.window]
    ends = np.cumsum([w.length for w in large])
    if not large:
        return []
    places = (np.arange(_SAMPLES) + 0.5) / _SAMPLES * ends[-1]
    return [large[index] for index in dict.fromkeys(int(i) for i in np.searchsorted(ends, places))]


def _patterns(weight: WeightRange, data: Array) -> Iterator[bytes]:
    """The beginning of a weight in each order of axes that plans have.

    Matrices lie as they are or transposed; kernels [out, in, y, x] as they are, with their channels last, or reversed.
    """
    raw = data[weight.offset : weight.offset + weight.length].view(_NUMPY[weight.data_type])
    if weight.data_type == onnx.TensorProto.INT4:
        raw = np.stack([raw & 15, raw >> 4], axis=-1)  # the first of two numbers is in the low bits
    raw = raw.reshape(weight.shape)
    columns = raw.reshape(len(raw), -1)
    rows = [columns[0, : weight.window], columns[: weight.window, 0]]
    if raw.ndim > 2:
        rows.append(raw[0].reshape(raw.shape[1], -1)[: weight.window, 0])
    if weight.data_type == onnx.TensorProto.INT4:
        rows = [row[::2] | row[1::2] << 4 for row in rows]
    for row in dict.fromkeys(row.tobytes() for row in rows):
        for pattern in _widths(row, weight):
            if len(set(pattern)) >= _LEAST_DISTINCT_BYTES:
                yield pattern


def _widths(row: bytes, weight: WeightRange) -> Iterator[bytes]:
    yield row
    if weight.is_widened and weight.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        yield np.frombuffer(row, _NUMPY[weight.data_type]).astype(np.float32).tobytes()
