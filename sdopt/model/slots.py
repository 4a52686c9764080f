"""Where LoRAs go in a compiled engine: y = W x + B (A x), with A and B as inputs of the graph.

A slot is a layer that has such a branch. Which layers have one, and up to which rank, is decided when a bundle is
built; what is in them can change between two steps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from sdopt.errors import UsageError

RANK_LIMIT = 1024
# Of diffusers' UNets, and of transformers' CLIP.
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
_AROUND_ATTENTION = (".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out", ".fc1", ".fc2")
WORDS_INPUT = "extra_embeddings"
"""The input of a text encoder's graph for the vectors of words that are loaded at run time (textual inversion)."""
WORDS_LIMIT = 1024
"""The most vectors of all words that are loaded together."""
_SETTING = re.compile(r"^(?:(?P<set>[a-z]+):)?(?P<rank>\d{1,4})$")


class SlotSet(StrEnum):
    """Which layers of the UNet and the text encoders have slots; each set contains the one before."""

    ATTENTION = "attention"
    """Queries, keys, values and outputs of attention."""
    TRANSFORMER = "transformer"
    """And feed-forward layers, and the projections around a UNet's transformers: what most LoRAs were trained on."""
    ALL = "all"
    """And every convolution and time embedding of the UNet: LoCon, LCM-LoRA and the like."""


@dataclass(frozen=True)
class SlotSettings:
    """`rank` is the most that all adapters that are active together may have."""

    layers: SlotSet
    rank: int

    def __str__(self) -> str:
        return f"{self.layers}:{self.rank}"


@dataclass(frozen=True)
class Slot:
    """A layer with a slot: its name in torch, and its weight's shape there, [out, in] or [out, in, height, width]."""

    layer: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WordSlot:
    """Where a text encoder takes words: ids from `vocabulary` on, with vectors of `width` numbers."""

    vocabulary: int
    width: int


def parse_slots(text: str) -> SlotSettings:
    """`64` or `attention:64`. Raises `UsageError` that says what is taken."""
    match = _SETTING.match(text.strip())
    rank = int(match["rank"]) if match else 0
    layers = (match["set"] if match else None) or SlotSet.TRANSFORMER
    if not 1 <= rank <= RANK_LIMIT or layers not in list(SlotSet):
        raise UsageError(
            f"{text!r} is not a rank from 1 to {RANK_LIMIT}, alone or with the layers before it",
            hint=f"for example 64, attention:64 or all:128; the layers are {', '.join(SlotSet)}",
        )
    return SlotSettings(SlotSet(layers), rank)


def input_names(layer: str) -> tuple[str, str]:
    """What the two inputs of a layer's slot are called in the graph: A, which is applied first, and B."""
    return f"{layer}.lora_A", f"{layer}.lora_B"


def wants_slot(layers: SlotSet, layer: str) -> bool:
    """Whether a layer of the UNet or of a text encoder has a slot in this set, by its name in torch."""
    if layers is SlotSet.ALL:
        return True
    ends = _ATTENTION if layers is SlotSet.ATTENTION else (*_ATTENTION, *_AROUND_ATTENTION)
    return f".{layer}".endswith(ends)


def slot_shapes(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a layer whose weight has `shape`.

    A linear layer is multiplied from the right: [in, rank] and [rank, out]. A convolution of 1x1 is a product from the
    left, [rank, in] and [out, rank]; a larger one has the taps of its kernel first, [height * width, rank, in].
    """
    out_channels, in_channels, *kernel = shape
    if not kernel:
        return (in_channels, rank), (rank, out_channels)
    taps = math.prod(kernel)
    return ((rank, in_channels) if taps == 1 else (taps, rank, in_channels)), (out_channels, rank)
