"""Prompts as token ids: cut into chunks, which text encoders take one by one and the UNet sees side by side.

A chunk is up to 75 tokens of the prompt between a start and an end, filled up to 77, and is encoded by itself, as A1111
does it. The pipelines of diffusers need no change for that: the tokenizer gives them rows of one chunk or several, and
the text encoder takes such rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding, CLIPTokenizer

from sdopt.bundle.again import variant_command
from sdopt.errors import UsageError
from sdopt.model.shape import CHUNK_TOKENS, MOST_CHUNKS
from sdopt.pipeline.batches import run_rows
from sdopt.pipeline.prompt_chunks import WORDS, Chunk, Filled, Unit, fill_chunks
from sdopt.pipeline.prompt_reading import PromptText, warn_of_grammar

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session

_log = logging.getLogger("sdopt")


class PromptTokenizer(CLIPTokenizer):  # type: ignore[misc]
    """CLIP's tokenizer, whose padded rows are chunks of 77 tokens, up to `most_chunks`.

    A `PromptText` is given as its sections say, in as many chunks as it says. Another text is words: with
    `padding="max_length"` and a `max_length` of `model_max_length`, which is what pipelines ask for with a prompt, in
    as many chunks as the longest of the texts needs; with 77, 154 and so on, which is what they ask for with its
    negative, in exactly as many. Rows without padding are CLIP's own.
    """

    most_chunks = 1
    extra_words: Mapping[Unit, Unit] = MappingProxyType({})
    """Words that stand for other ids, which may lie beyond the vocabulary: the ids of the word, and those."""
    _parted: re.Pattern[str] | None = None
    _folder: Path | None = None

    def set_words(self, ids: Mapping[Unit, Unit], names: Iterable[str]) -> None:
        """Let the words of these `names` stand for other ids: `ids` are those, by `ids_of_word`."""
        # CLIP makes one token of all punctuation in a row: `<cat>,` would end in another than `<cat>` does.
        edged = [name for name in names if not (name[0].isalnum() and name[-1].isalnum())]
        edged.sort(key=len, reverse=True)
        self._parted = re.compile("|".join(map(re.escape, edged)), re.IGNORECASE) if edged else None
        self.extra_words = MappingProxyType(dict(ids))

    def ids_of_word(self, name: str) -> Unit:
        """The ids of CLIP that a word in a prompt has, whatever its case. Raises `UsageError` where it has none."""
        ids = tuple(super().__call__(name, add_special_tokens=False)["input_ids"])
        if not ids or self.unk_token_id in ids:
            raise UsageError(
                f"{name!r} cannot be a word of prompts: CLIP's tokenizer has nothing for it",
                hint="give it another name, of letters and digits",
            )
        return ids

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        padding: Any = kwargs.get("padding")
        length: Any = kwargs.get("max_length")
        if args or text is None or kwargs.get("return_tensors") != "pt" or padding not in ("max_length", "longest"):
            return super().__call__(text, *args, **kwargs)
        given: list[str] = [text] if isinstance(text, str) else list(text)
        read = [each for each in given if isinstance(each, PromptText)]
        if len(read) < len(given):
            own_length = padding == "longest" or length in (None, self.model_max_length)
            if not own_length and length % CHUNK_TOKENS:
                return super().__call__(text, **kwargs)
            warn_of_grammar(given)
            words = [PromptText.of_words(str(each)) for each in given]
            chunks = self.count_chunks(words) if own_length else length // CHUNK_TOKENS
            read = [each.in_chunks(chunks) for each in words]
        filled = [(each.chunks, self._fill(each, each.chunks)) for each in read]
        if padding == "max_length":  # pipelines ask for "longest" of the same text, to compare
            for _, each in filled:
                self._warn_of_cuts(each)
        rows = [self._ids_of(chunks, each) for chunks, each in filled]
        return BatchEncoding(
            {"input_ids": [ids for ids, _ in rows], "attention_mask": [mask for _, mask in rows]}, tensor_type="pt"
        )

    def count_chunks(self, texts: Iterable[PromptText]) -> int:
        """How many chunks the longest of the texts gets: what it needs, and `most_chunks` at most."""
        return max((len(self._fill(text, self.most_chunks).chunks) for text in texts), default=1)

    def weights_of(self, texts: Sequence[PromptText]) -> torch.Tensor:
        """The weight of each token, fp32 (texts, tokens); of starts, ends and padding it is 1."""
        rows = []
        for text in texts:
            row = torch.ones(text.chunks, CHUNK_TOKENS)
            for place, chunk in zip(row, self._fill(text, text.chunks).chunks, strict=False):
                place[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
            rows.append(row.flatten())
        return torch.stack(rows)

    def _fill(self, text: PromptText, most: int) -> Filled:
        words = iter(self._encode_words([piece.text for section in text.sections for piece in section]))
        sections = [[(next(words), piece.weight) for piece in section] for section in text.sections]
        return fill_chunks(sections, most=most, comma=self._comma)

    @property
    def _comma(self) -> int | None:
        comma = self.convert_tokens_to_ids(",</w>")
        return None if comma == self.unk_token_id else int(comma)

    def _encode_words(self, texts: Sequence[str]) -> list[list[Unit]]:
        if not texts:
            return []
        if self._parted is not None:
            texts = [self._parted.sub(r" \g<0> ", text) for text in texts]
        words: list[list[int]] = super().__call__(list(texts), add_special_tokens=False)["input_ids"]
        return [self._units_of(ids) for ids in words]

    def _units_of(self, ids: list[int]) -> list[Unit]:
        longest = max(map(len, self.extra_words), default=1)
        units: list[Unit] = []
        start = 0
        while start < len(ids):
            names = (tuple(ids[start : start + length]) for length in range(longest, 0, -1))
            name = next((name for name in names if name in self.extra_words), (ids[start],))
            units.append(self.extra_words.get(name, name))
            start += len(name)
        return units

    def _ids_of(self, chunks: int, filled: Filled) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for chunk in (*filled.chunks, *[Chunk()] * (chunks - len(filled.chunks))):
            part = [self.bos_token_id, *chunk.ids, self.eos_token_id]
            missing = CHUNK_TOKENS - len(part)
            ids += [*part, *[self.pad_token_id] * missing]
            mask += [*[1] * len(part), *[0] * missing]
        return ids, mask

    def _warn_of_cuts(self, filled: Filled) -> None:
        rest = list(filled.rest)
        if not rest:
            return
        room = sum(len(chunk.ids) for chunk in filled.chunks)
        wanted = min(len(filled.chunks) + -(-len(rest) // WORDS), MOST_CHUNKS)
        command = variant_command(f"--tokens {wanted * CHUNK_TOKENS}", self._folder)
        _log.warning(
            "a prompt of %d tokens is cut after %d, without %r%s", room + len(rest), room, self.decode(rest),
            f"; more fit into a bundle of {command}" if wanted > self.most_chunks else "",
        )  # fmt: skip


def load_tokenizer(folder: Path, most_chunks: int) -> PromptTokenizer:
    """The tokenizer in a folder of a bundle, for prompts of up to `most_chunks` chunks."""
    tokenizer: PromptTokenizer = PromptTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.most_chunks = most_chunks
    tokenizer._folder = folder.parent
    # transformers would warn, once, that a prompt of more tokens than this leads to indexing errors.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    # All words between one start and one end. Of several chunks it is not a multiple of 77, which tells a prompt, of
    # whatever length, from a negative prompt that has to be as long as its prompt.
    tokenizer.model_max_length = most_chunks * WORDS + 2
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
