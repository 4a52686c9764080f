"""Bringing the difference of a weight to the rank that a slot has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter import LowRank
from sdopt.adapters.differences import Difference, Kronecker

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]
# Directions this much smaller than the largest are what fp32 rounds.
_ROUNDING = 2e-7
# A sketch has this many columns more than are kept, and is sharpened this often: enough for a spectrum that falls
# little. Above the size, the sketch is much the cheaper.
_SKETCH_MORE, _SKETCH_TIMES, _SKETCH_FROM = 16, 4, 512


@dataclass(frozen=True)
class _Spectrum:
    """The weight is `(u * s) @ v` and something whose squares sum to `rest`. `s` falls."""

    u: Floats
    s: Floats
    v: Floats
    rest: float = 0.0

    @property
    def energy(self) -> float:
        return float(np.square(self.s, dtype=np.float64).sum())


def reduce_rank(difference: Difference, rank_limit: int | None) -> tuple[Array, Array, float]:
    """(up [out, rank], down [rank, columns], relative error): the nearest pair of that rank or less.

    A pair that is within the limit stays as it is. Otherwise the least rank that is exact to fp32 is taken where it is
    within the limit, and the best pair of `rank_limit` where it is not; the error is |W - up @ down| / |W|.
    """
    if isinstance(difference, LowRank) and (rank_limit is None or difference.rank <= rank_limit):
        return difference.up, difference.down, 0.0
    found = _find_spectrum(difference, rank_limit)
    exact = max(1, int((found.s > found.s[0] * _ROUNDING).sum()))
    rank = exact if rank_limit is None else min(exact, rank_limit)
    lost = float(np.square(found.s[rank:], dtype=np.float64).sum()) + found.rest
    total = found.energy + found.rest
    root = np.sqrt(found.s[:rank])
    up, down = (found.u[:, :rank] * root).astype(np.float32), (root[:, None] * found.v[:rank]).astype(np.float32)
    return up, down, float(np.sqrt(lost / total)) if total else 0.0


def _find_spectrum(difference: Difference, limit: int | None) -> _Spectrum:
    """At least the first `limit` directions."""
    if isinstance(difference, Kronecker):
        return _multiply_spectra(
            _find_spectrum(difference.first, limit), _find_spectrum(difference.second, limit), difference.scale, limit
        )
    if isinstance(difference, LowRank):
        if difference.rank < min(len(difference.up), difference.down.shape[1]):
            return _find_of_pair(difference)
        difference = difference.up @ difference.down
    if limit is not None and min(difference.shape) >= max(_SKETCH_FROM, 4 * limit):
        return _sketch(difference, limit + _SKETCH_MORE)
    return _Spectrum(*np.linalg.svd(difference, full_matrices=False))


def _find_of_pair(pair: LowRank) -> _Spectrum:
    """Singular vectors of a product come from those of a small core between two orthonormal bases."""
    left, core_left = np.linalg.qr(pair.up.astype(np.float64))
    right, core_right = np.linalg.qr(pair.down.T.astype(np.float64))
    u, s, v = np.linalg.svd(core_left @ core_right.T)
    return _Spectrum(left @ u, s, v @ right.T)


def _multiply_spectra(first: _Spectrum, second: _Spectrum, scale: float, limit: int | None) -> _Spectrum:
    """Of a Kronecker product: every product of a direction of one with a direction of the other, the largest first."""
    products = np.outer(first.s, second.s)
    order = np.argsort(-products, axis=None, kind="stable")
    kept = order[: limit or len(order)]
    i, j = np.unravel_index(kept, products.shape)
    u = (first.u[:, None, i] * second.u[None, :, j]).reshape(-1, len(kept))
    v = (first.v[i, :, None] * second.v[j, None, :]).reshape(len(kept), -1)
    left_out = float(np.square(products.reshape(-1)[order[len(kept) :]], dtype=np.float64).sum())
    rest = first.rest * second.energy + second.rest * first.energy + first.rest * second.rest + left_out
    signed = u if scale >= 0 else -u
    return _Spectrum(signed, products.reshape(-1)[kept] * abs(scale), v, rest * scale * scale)


def _sketch(whole: Array, rank: int) -> _Spectrum:
    """The first singular vectors by a random range finder with power iterations, which is repeatable here."""
    start = np.random.default_rng(0).standard_normal((whole.shape[1], rank), dtype=np.float32)
    basis, _ = np.linalg.qr(whole @ start)
    for _ in range(_SKETCH_TIMES):
        other, _ = np.linalg.qr(whole.T @ basis)
        basis, _ = np.linalg.qr(whole @ other)
    core = basis.T @ whole
    u, s, v = np.linalg.svd(core, full_matrices=False)
    return _Spectrum(basis @ u, s, v, float(np.linalg.norm(whole - basis @ core)) ** 2)
