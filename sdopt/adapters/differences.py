"""The arrays that a file has for one layer -> the difference of its weight, as two factors or written out.

Everything is a matrix [out, in x height x width] in fp32, in the order of torch's weights. Formulas are those of
LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) and, for DoRA, of PEFT, which agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter import LowRank
from sdopt.adapters.keys import LayerKind

Array = npt.NDArray[np.float32]
Arrays = Mapping[str, Array]
# What LyCORIS adds to the norms of a DoRA; PEFT adds nothing, which is the same to fp32.
_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Kronecker:
    """`scale` x kron(`first`, `second`): each block of the weight is the second by a number of the first."""

    first: LowRank | Array
    second: LowRank | Array
    scale: float


# A pair or a Kronecker product where the file's factors are smaller than the weight, else the weight's difference.
Difference = LowRank | Kronecker | Array


def multiply(difference: Difference) -> Array:
    match difference:
        case LowRank():
            return difference.up @ difference.down
        case Kronecker():
            product: Array = np.kron(multiply(difference.first), multiply(difference.second))
            product *= np.float32(difference.scale)
            return product
        case _:
            return difference


def find_difference(kind: LayerKind, arrays: Arrays, scale: float) -> Difference:
    """`scale` is in it, of a pair in `up`. The arrays are taken over, and may be changed."""
    match kind:
        case LayerKind.LOW_RANK:
            return _low_rank(arrays, scale)
        case LayerKind.HADAMARD:
            return _hadamard(arrays, scale)
        case LayerKind.KRONECKER:
            return _kronecker(arrays, scale)
        case LayerKind.FULL:
            diff = arrays["diff"]
            whole: Array = diff.reshape(diff.shape[0], -1) * np.float32(scale)
            return whole


def _low_rank(arrays: Arrays, scale: float) -> LowRank:
    up, down = arrays["up"], arrays["down"]
    up = up.reshape(up.shape[0], -1)
    up *= np.float32(scale)
    if "mid" in arrays:
        # Channels first, then taps: mid [m, n, h, w] and down [n, in] are one convolution [m, in, h, w].
        mixed = np.einsum("mnhw,ni->mihw", arrays["mid"], down.reshape(down.shape[0], -1), optimize=True)
        return LowRank(mixed.reshape(mixed.shape[0], -1), up)
    return LowRank(down.reshape(down.shape[0], -1), up)


def _hadamard(arrays: Arrays, scale: float) -> Difference:
    """(a1 b1) * (a2 b2), element by element: rows of r1 x r2 products of columns, which is its rank at most."""
    (a1, b1), (a2, b2) = (_pair(arrays, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    out, columns = a1.shape[0], b1.shape[1]
    if a1.shape[1] * a2.shape[1] >= min(out, columns):
        whole: Array = (a1 @ b1) * (a2 @ b2) * np.float32(scale)
        return whole
    up = (a1[:, :, None] * a2[:, None, :]).reshape(out, -1) * np.float32(scale)
    return LowRank((b1[:, None, :] * b2[None, :, :]).reshape(-1, columns), up)


def _kronecker(arrays: Arrays, scale: float) -> Kronecker:
    return Kronecker(_factor(arrays, "lokr_w1", ""), _factor(arrays, "lokr_w2", "lokr_t2"), scale)


def _factor(arrays: Arrays, name: str, core: str) -> LowRank | Array:
    if name in arrays:
        return arrays[name].reshape(arrays[name].shape[0], -1)
    up, down = _pair(arrays, f"{name}_a", f"{name}_b", core)
    return LowRank(down, up)


def _pair(arrays: Arrays, a: str, b: str, core: str) -> tuple[Array, Array]:
    left, right = arrays[a], arrays[b]
    if core in arrays:  # Tucker: left [r, out], core [r, r, h, w], right [r, in]
        mixed = np.einsum("ijhw,jn->inhw", arrays[core], right, optimize=True)
        return left.T, mixed.reshape(mixed.shape[0], -1)
    return left, right.reshape(right.shape[0], -1)


def decompose(weight: Array, difference: Array, magnitude: Array, *, by_output: bool) -> Array:
    """DoRA: the difference that gives `weight` + `difference` the magnitudes of the file.

    `weight` and `difference` have the layer's own shape. The norm is over all but the first axis, or, as LyCORIS and
    OneTrainer did at first, over all but the second. Shape as `weight`.
    """
    merged = weight + difference
    axis = 0 if by_output else 1
    axes = tuple(i for i in range(merged.ndim) if i != axis)
    norm = np.sqrt(np.square(merged.astype(np.float64)).sum(axis=axes, keepdims=True)) + _EPSILON
    wanted = magnitude.reshape(norm.shape)
    changed: Array = (merged * (wanted / norm) - weight).astype(np.float32)
    return changed


def is_by_output(part: str, magnitude: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a DoRA's magnitudes belong to the outputs, by their shape and the weight's. PEFT's always do; LyCORIS'
    belong to the axis that they are as long as, and where both are, to the one that [out, 1] or [1, in] says.
    """
    count = math.prod(magnitude)
    if part == "magnitude" or count != weight[1]:
        return True
    return count == weight[0] and magnitude[:1] == (count,)
