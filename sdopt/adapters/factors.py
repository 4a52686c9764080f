"""The shapes of the factors that a file has for one layer: whether they fit each other, and which weight they make.

A weight counts as a matrix [out, in x height x width], as every format here treats a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sdopt.adapters.keys import LayerKind

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# No training uses more; what a hostile header asks for stays small.
_RANK_LIMIT = 8192


def find_rank(kind: LayerKind, shapes: Shapes) -> int:
    """The rank of a layer's factors, 0 for a difference that is written out. Raises `ValueError` with the reason where
    the shapes contradict each other.
    """
    matrix_shape(kind, shapes)
    match kind:
        case LayerKind.LOW_RANK:
            rank = shapes["down"][0]
        case LayerKind.HADAMARD:
            rank = shapes["hada_w1_b"][0]
        case LayerKind.KRONECKER:
            rank = next((shapes[part][0] for part in ("lokr_w2_b", "lokr_w1_b") if part in shapes), 0)
        case LayerKind.FULL:
            return 0
    if rank > _RANK_LIMIT or (rank == 0 and kind is not LayerKind.KRONECKER):
        raise ValueError(f"a rank of {rank}")
    return rank


def matrix_shape(kind: LayerKind, shapes: Shapes) -> tuple[int, int]:
    """(out, in x height x width) of the weight that the factors make. Raises `ValueError` as `find_rank`."""
    match kind:
        case LayerKind.LOW_RANK:
            return _low_rank(shapes)
        case LayerKind.HADAMARD:
            first = _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
            second = _product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
            _require(first == second, f"{first} and {second} are multiplied element by element")
            return first
        case LayerKind.KRONECKER:
            out1, in1 = _product(shapes, "lokr_w1_a", "lokr_w1_b", "", whole="lokr_w1")
            out2, in2 = _product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2", whole="lokr_w2")
            return out1 * out2, in1 * in2
        case LayerKind.FULL:
            return _as_matrix(shapes["diff"])


def has_kernel(shapes: Shapes) -> bool:
    """Whether a low-rank layer is one of a convolution of more than one tap."""
    return "mid" in shapes or math.prod(shapes.get("down", ())[2:]) > 1


def _low_rank(shapes: Shapes) -> tuple[int, int]:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    _require(len(down) in (2, 4), f"down is {list(down)}")
    _require(len(up) in (2, 4) and math.prod(up[2:]) == 1, f"up is {list(up)}")
    taps = 1
    if mid is not None:
        _require(
            len(mid) == 4 and mid[0] == up[1] and mid[1] == down[0] and math.prod(down[2:]) == 1, f"mid is {list(mid)}"
        )
        taps = math.prod(mid[2:])
    else:
        _require(up[1] == down[0], f"up is {list(up)} and down is {list(down)}")
    return up[0], math.prod(down[1:]) * taps


def _product(shapes: Shapes, a: str, b: str, core: str, whole: str = "") -> tuple[int, int]:
    """Of one factor: written out, a product of two, or (Tucker) a core [rank, rank, height, width] between two."""
    if whole in shapes:
        return _as_matrix(shapes[whole])
    left, right = shapes[a], shapes[b]
    _require(len(left) == 2 and len(right) in (2, 4), f"{a} is {list(left)} and {b} is {list(right)}")
    if core in shapes:
        middle = shapes[core]
        fits = len(middle) == 4 and len(right) == 2 and middle[:2] == (left[0], right[0])
        _require(fits, f"{core} is {list(middle)}, {a} is {list(left)} and {b} is {list(right)}")
        return left[1], right[1] * math.prod(middle[2:])
    _require(left[1] == right[0], f"{a} is {list(left)} and {b} is {list(right)}")
    return left[0], math.prod(right[1:])


def _as_matrix(shape: Shape) -> tuple[int, int]:
    """A norm's weight [channels] is one column."""
    _require(len(shape) in (1, 2, 4), f"a weight of shape {list(shape)}")
    return shape[0], math.prod(shape[1:])


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)
