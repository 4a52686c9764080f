"""Which layers of a network are quantised, and how: by where their inputs come from.

In a strongly typed network a quantised layer computes in the type that its inputs are dequantised to; that the builder
takes `DequantizeLinear` into the layer is seen in the plan alone (`plan_text.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdopt.model.quantization import Scheme

_SCHEMES = {
    ("INT8", "INT8"): Scheme.INT8, ("FP8", "FP8"): Scheme.FP8, ("INT8", ""): Scheme.INT8_WEIGHTS,
    ("INT4", ""): Scheme.INT4_WEIGHTS,
}  # fmt: skip
_WITH_WEIGHTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class QuantizedLayer:
    """`name` is the weight's without its ending, empty where no stored tensor of a quantised type is the weight.

    `scheme` is None for what sdopt never writes, and `text` says what it is.
    """

    name: str
    scheme: Scheme | None
    text: str


class QuantizedLayers:
    """Follows the inputs of a network's layers. A network's tensors are looked up by name, which is theirs alone."""

    def __init__(self, layers: list[Any]) -> None:
        self._producers = {
            layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)
        }

    def at(self, layer: Any) -> QuantizedLayer | None:
        """None for a layer that is not quantised, and for one that has no weights."""
        kind = layer.type.name
        if kind == "GATHER":  # a table of embeddings; a runtime widens the rows that are looked up
            weight, given = self._dequantized(layer, 0), None
        elif kind in _WITH_WEIGHTS:
            weight, given = self._dequantized(layer, 1), self._dequantized(layer, 0)
        else:
            return None
        weight_type = "" if weight is None else weight.get_input(0).dtype.name
        input_type = "" if given is None else given.get_input(0).dtype.name
        if not weight_type and not input_type:
            return None
        stored = None if weight is None else self._before(weight, 0)
        if stored is None or stored.type.name != "CONSTANT":
            return QuantizedLayer("", None, f"{_text(weight_type, input_type)} over float weights")
        scheme = _SCHEMES.get((weight_type, input_type))
        name = str(stored.name).removesuffix(".weight")
        return QuantizedLayer(name, scheme, scheme or _text(weight_type, input_type))

    def _dequantized(self, layer: Any, index: int) -> Any:
        """The `DequantizeLinear` that an input comes from; None where it comes from something else."""
        source = self._before(layer, index)
        return source if source is not None and source.type.name == "DEQUANTIZE" else None

    def _before(self, layer: Any, index: int) -> Any:
        """The layer that an input comes from, past what only moves axes; None for an input of the network."""
        while index < layer.num_inputs and (tensor := layer.get_input(index)) is not None:
            layer, index = self._producers.get(tensor.name), 0
            if layer is None or layer.type.name != "SHUFFLE":
                return layer
        return None


def _text(weight_type: str, input_type: str) -> str:
    parts = [(weight_type.lower(), "weights"), (input_type.lower(), "inputs")]
    return ", ".join(f"{kind} {what}" for kind, what in parts if kind)
