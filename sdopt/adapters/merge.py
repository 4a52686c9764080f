"""An adapter file as differences of a model's tensors, one layer at a time, for weights that are written anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter_file import AdapterFile
from sdopt.adapters.changes import Base, find_change
from sdopt.adapters.differences import multiply
from sdopt.adapters.match_layers import Layers, Match, match_layers
from sdopt.adapters.tensor_bytes import TensorReader, require_finite
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName


class WeightChange(NamedTuple):
    """Of `component`, `tensor` (`LAYER.weight` or `LAYER.bias`) gains strength x `difference`, fp32, of its shape."""

    component: ComponentName
    tensor: str
    difference: npt.NDArray[np.float32]


def weight_changes(file: AdapterFile, layers: Layers, base: Base) -> Iterator[WeightChange]:
    """Every change of the file at strength 1, in its order; one layer's numbers are in memory at a time.

    `layers` are all layers with a weight, with its shape; `base` holds the model's tensors by name. DoRA needs them:
    its difference is that of the decomposed weight, so half the strength is half of the way there. Raises
    `AdapterError` before the first change where a layer or bias is not the model's, and at one with NaN or infinity.
    """
    matches = match_layers(file, layers)
    _require_biases(file, matches, base)
    with TensorReader(file.path) as reader:
        for match in matches:
            arrays = reader.read_layer(match.of_file)
            require_finite(file.path, match.of_file.stem, arrays)
            if match.of_file.kind is not None:
                whole = multiply(find_change(file, match, arrays, base)).reshape(match.shape)
                require_finite(file.path, match.of_file.stem, {"difference": whole})
                yield WeightChange(match.component, f"{match.layer}.weight", whole)
            if "diff_b" in arrays:
                yield WeightChange(match.component, f"{match.layer}.bias", arrays["diff_b"])


def _require_biases(file: AdapterFile, matches: list[Match], base: Base) -> None:
    for match in matches:
        if "diff_b" in match.of_file.parts and f"{match.layer}.bias" not in base.get(match.component, {}):
            raise AdapterError(
                f"{file.path.name} changes the bias of {match.component}'s {match.layer}, which has none in the model",
                hint="take the adapter for the model's family",
            )
