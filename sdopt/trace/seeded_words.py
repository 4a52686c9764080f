"""Seeded words in a text, for parity: torch looks their vectors up in a longer table, the engine in its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdopt.model.slots import WordSlot

_VECTORS = 2
_IDS = "input_ids"


def make_vectors(words: WordSlot) -> Tensor:
    """Vectors of the magnitude of CLIP's own, fp32 [vectors, width]."""
    return torch.randn(_VECTORS, words.width, generator=torch.Generator().manual_seed(words.width)) * 0.02


def with_words(inputs: Mapping[str, Tensor], words: WordSlot) -> dict[str, Tensor]:
    """The inputs with the seeded words in front of each text, where `make_inputs` never has an end."""
    ids = inputs[_IDS].clone()
    ids[:, :_VECTORS] = words.vocabulary + torch.arange(_VECTORS)
    return {**inputs, _IDS: ids}


class WordTable(nn.Module):
    """A table of tokens that gives the seeded words in front of each text, whatever ids are there."""

    def __init__(self, table: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.table, self.vectors = table, vectors

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.table(ids).clone()
        embedded[:, : len(self.vectors)] = self.vectors
        return embedded


def put_words(network: nn.Module, words: WordSlot) -> None:
    """Let torch's network read the seeded words in front of each text, in place.

    It is then given a text without them: as the highest ids, some configs would pool there.
    """
    parent: Any = next(module for module in network.modules() if hasattr(module, "token_embedding"))
    parent.token_embedding = WordTable(parent.token_embedding, make_vectors(words))
