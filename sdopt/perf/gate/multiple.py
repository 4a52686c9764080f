"""Many series are tested every night: Benjamini-Hochberg keeps the share of false discoveries small."""

from __future__ import annotations

from collections.abc import Sequence


def adjust_p_values(p_values: Sequence[float]) -> tuple[float, ...]:
    """The q-value of each p-value: the smallest false discovery rate at which it would still be called real.

    Benjamini and Hochberg 1995, in the step-up form; right for independent tests and for positively dependent ones,
    as series of one machine are.
    """
    count = len(p_values)
    q_values = [1.0] * count
    smallest = 1.0
    by_size = sorted(range(count), key=p_values.__getitem__)
    for rank, index in reversed(list(enumerate(by_size, start=1))):
        smallest = min(smallest, p_values[index] * count / rank)
        q_values[index] = smallest
    return tuple(q_values)
