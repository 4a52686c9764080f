"""Which groups of layers stay quantised. Pure decisions: what is measured comes in as a function.

Each group is tried alone: one that is slower beyond doubt, or whose error the component's output does not bear, is out.
What is left is put together, the least harm for its gain first, as far as the output bears it: a group that alone makes
no difference in time saves half of its weights. Errors of independent roundings add up in quadrature, so that sum picks
the first set to try; what decides is the measurement of the set itself, which has to be faster beyond doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdopt.bundle.records import SpeedupRecord
from sdopt.model.quantization import Scheme

LEAST_GAIN = 1.02
"""What the whole component has to gain in speed: less is no difference."""

# Half of a block's weights counts as much as this share of the component's time.
_MEMORY_GAIN = 0.05


@dataclass(frozen=True)
class Measurement:
    """A component with some groups quantised, against its 16-bit engine.

    `error` is |a-b|/|b| of its outputs on held-out inputs, against torch fp32. `speedup` is None where the engine does
    not run on this machine; `slower_ns` is what a run takes longer. `float_layers` are those of the quantised layers
    that the engine does not compute in 8 bits. `base_error` is that of the 16-bit engine.
    """

    error: float
    speedup: SpeedupRecord | None = None
    slower_ns: float = 0.0
    float_layers: int = 0
    base_error: float = 0.0

    @property
    def added_error(self) -> float:
        """What quantisation adds to the 16-bit engine's error, in quadrature."""
        return math.sqrt(max(0.0, self.error**2 - self.base_error**2))


# No figure says anything of an output that is a hundred times as far from torch's as 0 is.
_LARGEST_ERROR = 100.0

Measure = Callable[[tuple[str, ...]], Measurement]


@dataclass(frozen=True)
class GroupVerdict:
    """`reason` says why a group stays in 16 bits, and is empty for one that is quantised."""

    measured: Measurement
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Verdict on each group, and the measurement of all that is kept together; None where nothing is."""

    groups: dict[str, GroupVerdict]
    together: Measurement | None

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(name for name, verdict in self.groups.items() if not verdict.reason)


def choose_groups(groups: Mapping[str, Scheme], measure: Measure, *, error_limit: float, slack_ns: float) -> Outcome:
    """Decide on every group. `slack_ns` is how much longer a run may take where weights alone are quantised."""
    verdicts: dict[str, GroupVerdict] = {}
    for name, scheme in groups.items():
        measured = measure((name,))
        verdicts[name] = GroupVerdict(measured, _find_fault(scheme, measured, error_limit, slack_ns))
    kept = sorted((n for n, v in verdicts.items() if not v.reason), key=lambda name: harm_of(verdicts[name].measured))
    while kept and _add_up([verdicts[name].measured for name in kept]) > error_limit:
        _drop(verdicts, kept.pop(), error_limit)
    together = None
    while kept:
        together = measure(tuple(name for name in groups if name in kept))
        if together.error <= error_limit:
            break
        _drop(verdicts, kept.pop(), error_limit)
        together = None
    if together is not None and (reason := find_loss(groups[kept[0]], together, slack_ns)):
        for name in kept:
            verdicts[name] = GroupVerdict(verdicts[name].measured, reason)
        together = None
    return Outcome(verdicts, together)


def harm_of(measured: Measurement) -> float:
    """Cost of keeping a group: squared added error over its gain. Lower is better."""
    speedup = measured.speedup
    faster = 0.0 if speedup is None else max(0.0, 1 - 1 / speedup.value)
    return measured.added_error**2 / (faster + _MEMORY_GAIN)


def _add_up(measured: Sequence[Measurement]) -> float:
    """What the error of all together would be, were their roundings independent."""
    return math.hypot(measured[0].base_error, *(each.added_error for each in measured))


def _drop(verdicts: dict[str, GroupVerdict], name: str, error_limit: float) -> None:
    measured = verdicts[name].measured
    reason = f"with the others, the error would pass {error_limit:.1%}, and this adds {measured.error:.1%}"
    verdicts[name] = GroupVerdict(measured, reason)


def _find_fault(scheme: Scheme, measured: Measurement, error_limit: float, slack_ns: float) -> str:
    # A NaN compares false with everything.
    if not measured.error < _LARGEST_ERROR:
        return f"its outputs are NaN, infinite or far from anything, where an error of {error_limit:.1%} is borne"
    if measured.error > error_limit:
        return f"error {measured.error:.1%} alone, above {error_limit:.1%}"
    if scheme.quantizes_activations and measured.float_layers:
        return f"{measured.float_layers} of its layers would not compute in 8 bits"
    speedup = measured.speedup
    if speedup is None:
        return ""
    if scheme.quantizes_activations and speedup.high < 1.0:
        return f"slower: {_format(speedup)}"
    if not scheme.quantizes_activations and speedup.high < 1.0 and measured.slower_ns > slack_ns:
        return f"slower by {measured.slower_ns / 1e6:.1f} ms, of which {slack_ns / 1e6:.1f} ms are borne"
    return ""


def find_loss(scheme: Scheme, together: Measurement, slack_ns: float) -> str:
    """Why groups that are quantised together do not pay; empty where they do."""
    if scheme.quantizes_activations and together.float_layers:
        return f"together, {together.float_layers} layers would not compute in 8 bits"
    speedup = together.speedup
    if speedup is None:
        return ""
    if scheme.quantizes_activations and not (speedup.low > 1.0 and speedup.value >= LEAST_GAIN):
        return f"all together are not faster: {_format(speedup)}"
    if not scheme.quantizes_activations and speedup.high < 1.0 and together.slower_ns > slack_ns:
        return f"all together are slower by {together.slower_ns / 1e6:.1f} ms"
    return ""


def _format(speedup: SpeedupRecord) -> str:
    return f"{speedup.value:.2f} times as fast ({speedup.low:.2f} to {speedup.high:.2f})"
