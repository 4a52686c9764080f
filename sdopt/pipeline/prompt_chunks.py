"""Tokens to chunks, as A1111 fills them: which token is in which chunk, and its weight. Knows no tokenizer.

A chunk has 75 tokens of a prompt. Where the 76th would be in the middle of a phrase, what follows the last comma moves
on to the next chunk with it, if that is no more than 20 tokens (A1111's `comma_padding_backtrack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sdopt.model.shape import CHUNK_TOKENS

WORDS = CHUNK_TOKENS - 2
"""Tokens of the prompt in a chunk: all but the start and the end."""

_MOST_MOVED = 20

Unit = tuple[int, ...]
"""Ids that no chunk's end may part: one token, or all vectors of a word that an embedding stands for (75 at most)."""


@dataclass
class Chunk:
    """Up to 75 token ids without start and end, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Filled:
    """`rest` are the ids for which there was no room. Of no tokens at all there is one chunk, which is empty."""

    chunks: tuple[Chunk, ...]
    rest: tuple[int, ...]


def fill_chunks(sections: Iterable[Iterable[tuple[Sequence[Unit], float]]], *, most: int, comma: int | None) -> Filled:
    """Fill at most `most` chunks with the units of sections, each of which begins a chunk.

    A section is units and their weight, several times. The last chunk that there may be is filled to its end, wherever
    its last comma is: what moved on would be lost.
    """
    filler = _Filler(most, comma)
    for number, section in enumerate(sections):
        if number:
            filler.begin()
        for units, weight in section:
            for unit in units:
                filler.add(unit, weight)
    return filler.finish()


class _Filler:
    def __init__(self, most: int, comma: int | None) -> None:
        self._most = most
        self._comma = comma
        self._chunks: list[Chunk] = []
        self._chunk = Chunk()
        self._last_comma: int | None = None
        self._rest: list[int] = []
        self._is_over = False

    def begin(self) -> None:
        """End the chunk, however full it is. After the last that there may be, everything is rest."""
        if len(self._chunks) + 1 >= self._most:
            self._is_over = True
            return
        self._chunks.append(self._chunk)
        self._chunk = Chunk()
        self._last_comma = None

    def add(self, unit: Unit, weight: float) -> None:
        used = len(self._chunk.ids)
        if unit == (self._comma,):
            self._last_comma = used
        elif used == WORDS and self._last_comma is not None and used - self._last_comma <= _MOST_MOVED:
            self._move_from(self._last_comma + 1)
        if len(self._chunk.ids) + len(unit) > WORDS and not self._is_over:
            self.begin()
        if self._is_over:
            self._rest += unit
            return
        self._chunk.ids += unit
        self._chunk.weights += [weight] * len(unit)

    def _move_from(self, start: int) -> None:
        if len(self._chunks) + 1 >= self._most:
            return
        ids, weights = self._chunk.ids, self._chunk.weights
        self._chunk = Chunk(ids[:start], weights[:start])
        self.begin()
        self._chunk = Chunk(ids[start:], weights[start:])

    def finish(self) -> Filled:
        last = (self._chunk,) if self._chunk.ids or not self._chunks else ()
        return Filled((*self._chunks, *last), tuple(self._rest))
