"""An adapter after its file was read: for each layer that it changes, two matrices whose product is the change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdopt.model.component import ComponentName


@dataclass(frozen=True)
class LowRank:
    """The weight [out, in] or [out, in, height, width] gains `up @ down`. Every scale of the file is in `up`.

    `down` is fp32 [rank, in] or [rank, in, height, width], `up` is fp32 [out, rank].
    """

    down: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Adapter:
    """`layers` are named as in the weight files of a bundle. `fit_errors` are |W - up @ down| / |W| of the changes that
    are not of low rank in the file and were brought to it, by component and layer.
    """

    name: str
    path: Path
    sha256: str
    layers: Mapping[ComponentName, Mapping[str, LowRank]]
    fit_errors: Mapping[ComponentName, Mapping[str, float]] = field(default_factory=dict)
    tensors_sha256: str = ""
    """Of what lies behind the file's header, by which A1111 and Civitai know it."""

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max((pair.rank for layers in self.layers.values() for pair in layers.values()), default=0)
