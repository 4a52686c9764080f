"""How large a network's values get, layer by layer: what decides whether a narrow number format can hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A matrix of logits has a row for each query: of a picture of 1024 px that is a gigabyte, so they come in pieces.
_QUERIES_AT_ONCE = 1024


@contextmanager
def watch_magnitudes(network: nn.Module) -> Iterator[dict[str, float]]:
    """While open, each run of `network` notes the largest absolute value of each layer, over all runs.

    The table has every parameter, the output of every module, blocks too (where residuals are added), and as
    `NAME.logits` what an attention layer gives to its softmax. NaN counts as infinity. Sums inside one operation are
    not seen: kernels for 16-bit formats add up in fp32.
    """
    seen = {
        name.removeprefix("network."): _largest_of(value) for name, value in network.named_parameters() if value.numel()
    }
    handles = []
    for full_name, module in network.named_modules():
        if name := full_name.removeprefix("network").removeprefix("."):
            handles.append(module.register_forward_hook(_note_output(name, seen)))
        if hasattr(module, "to_q") and hasattr(module, "to_k"):
            handles += _watch_logits(name, module, seen)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_largest(magnitudes: dict[str, float]) -> tuple[str, float]:
    """(layer, magnitude) of the largest; of equal ones the first that was computed."""
    layer = max(magnitudes, key=lambda name: magnitudes[name])
    return layer, magnitudes[layer]


def _note(seen: dict[str, float], name: str, value: float) -> None:
    seen[name] = max(seen.get(name, 0.0), value)


def _note_output(name: str, seen: dict[str, float]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if isinstance(output, Tensor) and output.is_floating_point():
            _note(seen, name, _largest_of(output))

    return hook


def _watch_logits(name: str, attention: Any, seen: dict[str, float]) -> list[Any]:
    """Hooks on an attention layer of diffusers, which hands queries and keys to one fused operation."""
    held: dict[str, Tensor] = {}

    def hold(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            held[part] = output

        return hook

    def multiply(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs, output
        _note(seen, f"{name}.logits", _largest_logit(held.pop("q"), held.pop("k"), int(attention.heads)))

    return [
        attention.to_q.register_forward_hook(hold("q")),
        attention.to_k.register_forward_hook(hold("k")),
        attention.register_forward_hook(multiply),
    ]


def _largest_logit(queries: Tensor, keys: Tensor, heads: int) -> float:
    """Largest |q.k| / sqrt(head width) of queries and keys [batch, tokens, heads x width]."""
    width = queries.shape[-1] // heads
    q, k = (value.reshape(*value.shape[:2], heads, width).transpose(1, 2) for value in (queries, keys))
    pieces = (q[:, :, start : start + _QUERIES_AT_ONCE] for start in range(0, q.shape[2], _QUERIES_AT_ONCE))
    return max(_largest_of(piece @ k.transpose(-1, -2)) for piece in pieces) / math.sqrt(width)


def _largest_of(value: Tensor) -> float:
    low, high = torch.aminmax(value)  # of the absolute values would make a copy
    largest = max(-low.item(), high.item())
    return math.inf if math.isnan(largest) else largest
