"""Bringing the difference of a weight to the rank that a slot has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter import LowRank
from sdopt.adapters.differences import Difference, multiply

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]
# Directions this much smaller than the largest are what fp32 rounds.
_ROUNDING = 2e-7
# A sketch has this many columns more than are kept, and is sharpened this often: enough for a spectrum that falls
# little. Above the size, the sketch is much the cheaper.
_SKETCH_MORE, _SKETCH_TIMES, _SKETCH_FROM = 16, 4, 512


def reduce_rank(difference: Difference, rank_limit: int | None) -> tuple[Array, Array, float]:
    """(up [out, rank], down [rank, columns], relative error): the nearest pair of that rank or less.

    The least rank that is exact to fp32 is taken where it is within the limit; the error is that of the best pair
    of `rank_limit` otherwise, |W - up @ down| / |W|.
    """
    if isinstance(difference, LowRank) and difference.rank < min(len(difference.up), difference.down.shape[1]):
        # Singular vectors of a product come from those of a small core between two orthonormal bases.
        left, core_left = np.linalg.qr(difference.up.astype(np.float64))
        right, core_right = np.linalg.qr(difference.down.T.astype(np.float64))
        u, s, v = np.linalg.svd(core_left @ core_right.T)
        return _cut(left @ u, s, v @ right.T, rank_limit)
    whole = multiply(difference)
    if rank_limit is not None and min(whole.shape) >= max(_SKETCH_FROM, 4 * rank_limit):
        up, down, _ = _cut(*_sketch(whole, rank_limit + _SKETCH_MORE), rank_limit)
        size = float(np.linalg.norm(whole))
        return up, down, float(np.linalg.norm(whole - up @ down)) / size if size else 0.0
    return _cut(*np.linalg.svd(whole, full_matrices=False), rank_limit)


def _sketch(whole: Array, rank: int) -> tuple[Array, Array, Array]:
    """The first singular vectors by a random range finder with power iterations, which is repeatable here."""
    start = np.random.default_rng(0).standard_normal((whole.shape[1], rank), dtype=np.float32)
    basis, _ = np.linalg.qr(whole @ start)
    for _ in range(_SKETCH_TIMES):
        other, _ = np.linalg.qr(whole.T @ basis)
        basis, _ = np.linalg.qr(whole @ other)
    u, s, v = np.linalg.svd(basis.T @ whole, full_matrices=False)
    return basis @ u, s, v


def _cut(u: Floats, s: Floats, v: Floats, limit: int | None) -> tuple[Array, Array, float]:
    exact = max(1, int((s > s[0] * _ROUNDING).sum()))
    rank = exact if limit is None else min(exact, limit)
    squares = np.square(s, dtype=np.float64)
    error = float(np.sqrt(squares[rank:].sum() / squares.sum())) if s[0] else 0.0
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32), error
