"""Many series are tested every night: Benjamini-Hochberg keeps the share of false discoveries small."""

from __future__ import annotations

from collections.abc import Sequence


def adjust_p_values(p_values: Sequence[float]) -> tuple[float, ...]:
    """The q-value of each p-value: the smallest false discovery rate at which it would still be called real.

    Benjamini and Hochberg 1995, in the step-up form; right for independent tests and for positively dependent ones,
    as series of one machine are.
    """
    from scipy.stats import false_discovery_control

    return tuple(false_discovery_control(p_values).tolist())
