"""Prompts that are longer than what CLIP takes: cut into chunks, which the UNet sees side by side.

A chunk is up to 75 tokens of the prompt between a start and an end, filled up to 77, and is encoded by itself, as A1111
does it. The pipelines of diffusers need no change for that: the tokenizer gives them rows of one chunk or several, and
the text encoder takes such rows.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding, CLIPTokenizer

from sdopt.model.shape import CHUNK_TOKENS
from sdopt.pipeline.batches import run_rows

if TYPE_CHECKING:
    from pathlib import Path

    from sdopt.backends.protocol import Session

# Tokens of the prompt in a chunk: all but the start and the end.
_WORDS = CHUNK_TOKENS - 2
# What `--tokens` takes at most.
_MOST_CHUNKS = 3
_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_log = logging.getLogger("sdopt")


class PromptTokenizer(CLIPTokenizer):  # type: ignore[misc]
    """CLIP's tokenizer, whose padded rows are as many chunks as the longest of the texts needs, up to `most_chunks`.

    `padding="max_length"` with `max_length` of `model_max_length`, which is what pipelines ask for with a prompt, gives
    that many, and no fewer than `least_chunks`. A `max_length` of 77, 154 or 231, which is the length of the prompt and
    what they ask for with its negative, gives exactly that. Rows without padding are CLIP's own.
    """

    most_chunks = 1
    least_chunks = 1

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        padding, length = kwargs.get("padding"), kwargs.get("max_length")
        if args or text is None or kwargs.get("return_tensors") != "pt" or padding not in ("max_length", "longest"):
            return super().__call__(text, *args, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        words = self._encode_words(texts)
        if padding == "longest" or length in (None, self.model_max_length):
            chunks = max(self.least_chunks, self._count_chunks(words))
        elif length % CHUNK_TOKENS:
            return super().__call__(text, **kwargs)
        else:
            chunks = length // CHUNK_TOKENS
        if padding == "max_length":  # pipelines ask for "longest" of the same text, to compare
            self._warn_of_cuts(words, chunks)
        rows = [self._split(row, chunks) for row in words]
        return BatchEncoding(
            {"input_ids": [ids for ids, _ in rows], "attention_mask": [mask for _, mask in rows]}, tensor_type="pt"
        )

    def count_chunks(self, texts: Sequence[str]) -> int:
        """How many chunks the longest of the texts gets: what it needs, and `most_chunks` at most."""
        return self._count_chunks(self._encode_words(texts))

    def _count_chunks(self, words: Sequence[list[int]]) -> int:
        longest = max(map(len, words), default=0)
        return min(self.most_chunks, max(1, -(-longest // _WORDS)))

    def _encode_words(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        words: list[list[int]] = super().__call__(list(texts), add_special_tokens=False)["input_ids"]
        return words

    def _split(self, words: list[int], chunks: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for start in range(0, chunks * _WORDS, _WORDS):
            part = [self.bos_token_id, *words[start : start + _WORDS], self.eos_token_id]
            missing = CHUNK_TOKENS - len(part)
            ids += [*part, *[self.pad_token_id] * missing]
            mask += [*[1] * len(part), *[0] * missing]
        return ids, mask

    def _warn_of_cuts(self, words: Sequence[list[int]], chunks: int) -> None:
        room = chunks * _WORDS
        for row in words:
            if len(row) <= room:
                continue
            wanted = min(-(-len(row) // _WORDS), _MOST_CHUNKS)
            more = f"; a bundle made with --tokens {wanted * CHUNK_TOKENS} takes {wanted * _WORDS}"
            _log.warning(
                "a prompt of %d tokens is cut after %d, without %r%s", len(row), room, self.decode(row[room:]),
                more if wanted > self.most_chunks else "",
            )  # fmt: skip


def load_tokenizer(folder: Path, most_chunks: int) -> PromptTokenizer:
    """The tokenizer in a folder, for prompts of up to `most_chunks` chunks."""
    tokenizer: PromptTokenizer = PromptTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.most_chunks = most_chunks
    # transformers would warn, once, that a prompt of more tokens than this leads to indexing errors.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    # All words between one start and one end. Of several chunks it is not a multiple of 77, which tells a prompt, of
    # whatever length, from a negative prompt that has to be as long as its prompt.
    tokenizer.model_max_length = most_chunks * _WORDS + 2
    return tokenizer


def run_in_chunks(session: Session, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a text encoder on ids (rows, tokens), where tokens is any multiple of those that the engine takes.

    Chunks are encoded by themselves. States are joined along the tokens; of pooled vectors the first chunk's is given.
    """
    rows, tokens = input_ids.shape
    chunks, rest = divmod(tokens, session.extents["tokens"].opt)
    if rest or chunks < 2:
        return run_rows(session, {"input_ids": input_ids})
    outputs = run_rows(session, {"input_ids": input_ids.reshape(rows * chunks, -1)})
    return {
        name: value.reshape(rows, tokens, -1) if value.ndim == 3 else value.reshape(rows, chunks, -1)[:, 0]
        for name, value in outputs.items()
    }


def count_chunks(pipe: Any, texts: Iterable[str]) -> int:
    """How many chunks a pipeline encodes these texts in, so that all of them have one length."""
    texts = list(texts)
    return max((tokenizer.count_chunks(texts) for tokenizer in _tokenizers_of(pipe)), default=1)


def with_long_prompts(kind: Any) -> Any:
    """The pipeline's class with prompts and negative prompts of one call encoded in the same number of chunks.

    It keeps its name, by which `AutoPipelineFor….from_pipe` finds its relatives. Those also encode a prompt in as many
    chunks as it needs, and cut a negative prompt that is longer.
    """
    signature = inspect.signature(kind.encode_prompt)

    @functools.wraps(kind.encode_prompt)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        embeds = (given[name].shape[1] // CHUNK_TOKENS for name in _EMBEDS if given.get(name) is not None)
        with _at_least(self, max(count_chunks(self, _texts_in(given)), *embeds, 1)):
            return kind.encode_prompt(self, *args, **kwargs)

    members = {"encode_prompt": encode_prompt, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _texts_in(given: dict[str, Any]) -> Iterator[str]:
    for name in _TEXTS:
        value = given.get(name)
        yield from [value] if isinstance(value, str) else value or ()


def _tokenizers_of(pipe: Any) -> list[PromptTokenizer]:
    parts = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [part for part in parts if isinstance(part, PromptTokenizer)]


@contextmanager
def _at_least(pipe: Any, chunks: int) -> Iterator[None]:
    tokenizers = _tokenizers_of(pipe)
    for tokenizer in tokenizers:
        tokenizer.least_chunks = chunks
    try:
        yield
    finally:
        for tokenizer in tokenizers:
            tokenizer.least_chunks = 1
