"""A prompt as it was typed to what is drawn at each step. The only place where prompts are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from sdopt.errors import UsageError
from sdopt.pipeline.prompt_grammar import (
    AdapterTag,
    Piece,
    Sections,
    changes_between_steps,
    take_adapters,
    texts_of_steps,
    weigh,
)
from sdopt.pipeline.prompt_syntax import refuse_syntax

_log = logging.getLogger("sdopt")
# What syntax there is has one of these, or is a keyword.
_MARKS = ("(", "[", "<", "{", "__", "--", "::", "\\", "BREAK", "AND", "embedding:")


class PromptText(str):
    """What is drawn at a step: a str, so that pipelines of diffusers hand it on to `PromptTokenizer`, which reads
    `sections`. It gets `chunks` chunks, whatever it needs.
    """

    __slots__ = ("chunks", "sections")

    sections: Sections
    chunks: int

    def __new__(cls, text: str, sections: Sections, chunks: int = 1) -> Self:
        # Diffusers takes an empty one for one that was not given; what is drawn is in the sections.
        made = super().__new__(cls, text or " ")
        made.sections = sections
        made.chunks = chunks
        return made

    @classmethod
    def of_words(cls, text: str, chunks: int = 1) -> Self:
        """Words and nothing else, brackets too."""
        return cls(text, ((Piece(text),),) if text else ((),), chunks)

    def in_chunks(self, chunks: int) -> PromptText:
        return PromptText(str(self), self.sections, chunks)


@dataclass(frozen=True)
class ReadPrompt:
    """`texts` are one for each step, or one for all; `adapters` are what the prompt names."""

    texts: tuple[PromptText, ...]
    adapters: tuple[AdapterTag, ...] = ()

    def at(self, step: int) -> PromptText:
        """The text of a step, the first of which is 0."""
        return self.texts[step if len(self.texts) > 1 else 0]


def read_prompt(
    prompt: str, steps: int | None, *, strict: bool = False, words: Iterable[str] = ()
) -> ReadPrompt:  # fmt: skip
    """Read a prompt that is drawn in `steps` steps; None where nobody knows how many. `words` are those that textual
    inversion has added.

    Raises `UsageError` for what cannot be drawn: weights that are no numbers, words that change between steps where
    those are not known, and syntax of other programs; that which is not `strict` is only logged.
    """
    text, adapters = take_adapters(prompt)
    if steps is None and changes_between_steps(text):
        raise UsageError(
            "the prompt has words that change between the steps, and only a whole drawing has steps",
            hint="call the pipeline itself, and not its encode_prompt",
        )
    texts = texts_of_steps(text, steps or 1)
    read: dict[str, PromptText] = {}
    for each in texts:
        if each not in read:
            refuse_syntax(each, strict=strict, words=words)
            read[each] = PromptText(each, weigh(each))
    return ReadPrompt(tuple(read[each] for each in texts), adapters)


def read_words(prompt: str) -> str:
    """The words of a prompt for a pipeline that reads none of the grammar.

    Raises `UsageError` where they would not be all: for weights, chunks, changes between steps and adapters.
    """
    read = read_prompt(prompt, None, strict=True)
    (section, *others) = read.texts[0].sections
    if read.adapters or others or any(piece.weight != 1 for piece in section):
        raise UsageError("the prompt has syntax that this pipeline does not read", hint="load a bundle with sdopt.load")
    return "".join(piece.text for piece in section)


def refuse_adapters(adapters: Sequence[AdapterTag]) -> None:
    """Raise `UsageError` for the first: a pipeline that is called itself does not know where LoRAs are."""
    for tag in adapters:
        raise UsageError(
            f"the prompt asks for the LoRA {tag.name!r}, and this call does not know where LoRAs are",
            hint="pipe.load_lora_weights(file) and pipe.set_adapters(name, weight); or draw a request with sdopt.draw. "
            "To draw the tag as words, write \\<lora:…\\>",
        )


def warn_of_grammar(texts: Iterable[str]) -> None:
    """Log what a pipeline that is not of this package is about to draw as words, brackets and all."""
    for text in texts:
        if not isinstance(text, PromptText) and any(mark in text for mark in _MARKS) and text != _try_words(text):
            _log.warning(
                "the prompt %r has weights or other syntax, which this pipeline draws as plain words: draw with the "
                "pipeline of sdopt.load, or with sdopt.draw", text,
            )  # fmt: skip


def _try_words(text: str) -> str | None:
    try:
        return read_words(text)
    except UsageError:
        return None
