"""What is noted of a layer's inputs while a network runs: their largest magnitudes, or how they spread over bins.

nvidia-modelopt's own calibrators take one call after another in this way, too, but count in fp32, which forgets single
values above 2^24 (its entropy search then fails with "Count mismatch"), and grow by as many bins as the largest value
asks for. Here counts are 64-bit integers in a fixed number of bins, which double their width when a value lies above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sdopt.errors import CalibrationError

BINS = 8192
# `torch.histc` counts in fp32: of no more values than this can it lose one.
_VALUES_AT_ONCE = 1 << 23


class Observer(Protocol):
    """What nvidia-modelopt's quantisers call with a layer's inputs, and its state between two runs."""

    def collect(self, values: Tensor) -> None:
        """Note the inputs of one call. Raises `CalibrationError` that names the layer for NaN and infinity."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Largest:
    """The largest magnitude, over everything."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self.largest = 0.0

    def collect(self, values: Tensor) -> None:
        self._note(values)

    def _note(self, values: Tensor) -> float:
        low, high = torch.aminmax(values)  # of the magnitudes would make a copy
        found = _require_finite(self._layer, torch.maximum(high, -low)).item()
        self.largest = max(self.largest, found)
        return found

    def state(self) -> dict[str, Tensor]:
        return {"largest": torch.tensor(self.largest, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.largest = state["largest"].item()


class Histogram(Largest):
    """How many magnitudes fall into each of `BINS` bins from 0 to `top`; `counts` is int64 [BINS]."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.top = 0.0

    def collect(self, values: Tensor) -> None:
        flat = values.float().flatten()
        largest = self._note(flat)
        if not self.top:
            self.top = largest  # what there was before it were zeros, which lie in the first bin anyway
        if not self.top:
            self.counts[0] += flat.numel()
            return
        while largest > self.top:
            self._widen()
        for piece in torch.split(flat, _VALUES_AT_ONCE):
            both = torch.histc(piece, bins=2 * BINS, min=-self.top, max=self.top).to(torch.int64)
            self.counts += both[BINS:] + both[:BINS].flip(0)

    def _widen(self) -> None:
        halved = self.counts.reshape(-1, 2).sum(dim=1)
        self.counts = torch.cat([halved, torch.zeros_like(halved)])
        self.top *= 2

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "counts": self.counts, "top": torch.tensor(self.top, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self.counts, self.top = state["counts"].clone(), state["top"].item()


class ChannelLargest:
    """The largest magnitude of each input of a linear layer, along the last axis; `largest` is fp32 [inputs]."""

    def __init__(self, layer: str, inputs: int) -> None:
        self._layer = layer
        self.largest = torch.zeros(inputs)

    def collect(self, values: Tensor) -> None:
        found = values.float().abs().flatten(0, -2).amax(dim=0)
        self.largest = torch.maximum(self.largest, _require_finite(self._layer, found))

    def state(self) -> dict[str, Tensor]:
        return {"largest": self.largest}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.largest = state["largest"].clone()


def _require_finite(layer: str, largest: Tensor) -> Tensor:
    if not bool(largest.isfinite().all()):
        raise CalibrationError(
            f"the layer {layer!r} cannot be calibrated: its input holds NaN or infinite numbers",
            hint="keep it in 16 bits: name it under `keep` in the quantization file",
        )
    return largest
