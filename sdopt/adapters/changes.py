"""What an adapter adds to a weight at strength 1, from its own numbers and, for DoRA, the weight's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdopt.adapters.adapter_file import AdapterFile, FileLayer
from sdopt.adapters.differences import Difference, decompose, find_difference, is_by_output, multiply
from sdopt.adapters.match_layers import Match
from sdopt.adapters.tensor_bytes import read_tensor
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName
from sdopt.weights.safetensors_header import TensorRef

Array = npt.NDArray[np.float32]
Base = Mapping[ComponentName, Mapping[str, TensorRef]]


def find_change(file: AdapterFile, match: Match, arrays: Mapping[str, Array], base: Base | None) -> Difference:
    """The difference of the weight as a matrix, with every scale of the file. `base` holds the bundle's tensors by
    their own names, `LAYER.weight`; only DoRA needs it. Raises `AdapterError` where it is missing.
    """
    layer = match.of_file
    assert layer.kind is not None
    difference = find_difference(layer.kind, arrays, find_scale(file, layer, arrays))
    if not layer.is_decomposed:
        return difference
    ref = (base or {}).get(match.component, {}).get(f"{match.layer}.weight")
    if ref is None:
        raise AdapterError(
            f"{file.path.name} is a DoRA, which depends on the model's weights, and that of {match.layer} is not there",
            hint="load it with the engines that it is for",
        )
    part = "magnitude" if "magnitude" in layer.parts else "dora_scale"
    by_output = is_by_output(part, layer.parts[part].shape, match.shape)
    weight = read_tensor(ref).reshape(match.shape)
    changed = decompose(weight, multiply(difference).reshape(match.shape), arrays[part], by_output=by_output)
    return changed.reshape(changed.shape[0], -1)


def find_scale(file: AdapterFile, layer: FileLayer, arrays: Mapping[str, Array]) -> float:
    """alpha / rank by the file, or as PEFT's settings have it; 1 where nothing is said."""
    if layer.rank == 0:  # written out; LyCORIS has an alpha beside a LoKr of two whole factors, and does not use it
        return 1.0
    if "alpha" in arrays:
        alpha = float(arrays["alpha"].reshape(-1)[0]) if arrays["alpha"].size else 0.0
        # kohya and LyCORIS take 0 as no alpha, which is the rank.
        return alpha / layer.rank if alpha else 1.0
    prefix, _, rest = layer.stem.partition(".")
    settings = file.peft.get(prefix) or file.peft.get("")
    return settings.scale(rest, layer.rank) if settings else 1.0
