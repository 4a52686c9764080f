"""The words that textual inversion has added to a loaded pipeline: vectors in the text encoders' engines, and ids in
the tokenizers.

Nothing is rebuilt: ids from the vocabulary's end on are rows of an input. Rows are dealt out anew whenever a word comes
or goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sdopt.adapters.word_file import WordFile
from sdopt.backends.slotted_session import SlottedSession
from sdopt.bundle.again import again_command
from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import AdapterError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.slots import WORDS_LIMIT, WordSlot
from sdopt.pipeline.prompt import PromptTokenizer
from sdopt.pipeline.prompt_chunks import Unit

_PARTS = {"clip_l": ComponentName.TEXT_ENCODER, "clip_g": ComponentName.TEXT_ENCODER_2}


@dataclass(frozen=True)
class LoadedWord:
    """`name` is what prompts call it; `vectors`, fp32 [vectors, width], are those of the text encoders that know it."""

    name: str
    path: Path
    sha256: str
    vectors: Mapping[ComponentName, torch.Tensor]


class WordStack:
    """`sessions` are the text encoders with a place for words, `tokenizers` those of all text encoders.

    Not safe to call from several threads: the pipeline's turn is for whoever calls it.
    """

    def __init__(
        self, folder: Path, manifest: BundleManifest, sessions: Mapping[ComponentName, SlottedSession],
        tokenizers: Mapping[ComponentName, PromptTokenizer],
    ) -> None:  # fmt: skip
        self._folder, self._manifest, self._sessions, self._tokenizers = folder, manifest, sessions, tokenizers
        self.words: dict[str, LoadedWord] = {}

    def fit(self, file: WordFile, name: str, only: ComponentName | None = None) -> LoadedWord:
        """The word as these engines take it, in all text encoders or in one; it does not act yet.

        Raises `UsageError` for a bundle of before there were words, `AdapterError` for vectors of another family.
        """
        slots = self._require_places()
        wanted = [only] if only is not None else list(slots)
        vectors: dict[ComponentName, torch.Tensor] = {}
        for component in wanted:
            key = next((part for part, place in _PARTS.items() if place is component and part in file.vectors), "")
            if key not in file.vectors or (only is None and len(wanted) > 1 and not key):
                raise self._other_family(file, f"{component} gets no vectors of it")
            value = torch.from_numpy(file.vectors[key])
            if value.shape[1] != slots[component].width:
                raise self._other_family(file, f"{component} has {slots[component].width}")
            dtype = self._sessions[component].slot_dtype
            if not torch.isfinite(value.to(dtype)).all():
                raise AdapterError(f"{file.shown} has numbers that {str(dtype).removeprefix('torch.')} cannot hold")
            vectors[component] = value
        left = [part for part in file.vectors if part and _PARTS[part] not in wanted]
        # The refiner has one of SDXL's two text encoders.
        if only is None and left and ComponentName.TEXT_ENCODER in wanted:
            raise self._other_family(file, f"nothing here takes {left[0]}")
        return LoadedWord(name, file.path, file.sha256, vectors)

    def _other_family(self, file: WordFile, what: str) -> AdapterError:
        widths = " and ".join(str(width) for width in file.shapes.widths.values())
        family, own = file.shapes.family, self._manifest.family
        of = f" of {family.label}" if family is not None and family is not own else ""
        return AdapterError(
            f"{file.shown} is a word{of} with vectors of {widths} numbers, and {what}: it does not fit this "
            f"{own.label} bundle",
            hint=f"take a textual inversion that was trained on {own.label}",
        )

    def _require_places(self) -> dict[ComponentName, WordSlot]:
        found = {
            name: session.slots.words for name, session in self._sessions.items() if session.slots.words is not None
        }
        if found.keys() != self._tokenizers.keys() or not found:
            raise UsageError(
                f"{self._folder.name} was built before its text encoders took words from textual inversions",
                hint=f"build it again: {again_command(self._folder)}",
            )
        return found

    def set(self, words: Mapping[str, LoadedWord]) -> None:
        """Let just these words act. Raises `UsageError` for two that prompts cannot tell apart and for a name that a
        tokenizer cannot read, `AdapterError` for too many vectors; then nothing has changed.
        """
        slots = self._require_places() if words else {}
        rows: dict[ComponentName, torch.Tensor | None] = dict.fromkeys(self._sessions)
        ids: dict[ComponentName, dict[Unit, Unit]] = {name: {} for name in self._tokenizers}
        for component, slot in slots.items():
            ours = {name: word.vectors[component] for name, word in words.items() if component in word.vectors}
            start = slot.vocabulary
            for name, vectors in ours.items():
                key = self._ids_of(component, name)
                if key in ids[component]:
                    raise _clash(name, next(each for each in ours if self._ids_of(component, each) == key))
                ids[component][key] = tuple(range(start, start + len(vectors)))
                start += len(vectors)
            if start - slot.vocabulary > WORDS_LIMIT:
                raise AdapterError(
                    f"the loaded words have {start - slot.vocabulary} vectors, and the engines take {WORDS_LIMIT}",
                    hint="unload words that no prompt names",
                )
            rows[component] = torch.cat(list(ours.values())) if ours else None
        for component, session in self._sessions.items():
            session.set_words(rows[component])
        for component, tokenizer in self._tokenizers.items():
            tokenizer.set_words(ids[component], [name for name, word in words.items() if component in word.vectors])
        self.words = dict(words)

    def add(self, words: Sequence[LoadedWord]) -> None:
        """Let more words act. Raises as `set` does, and `UsageError` for a name that is taken."""
        every = dict(self.words)
        for word in words:
            if word.name in every:
                raise _clash(word.name, word.name)
            every[word.name] = word
        self.set(every)

    def remove(self, names: Sequence[str]) -> None:
        """Raises `UsageError` for a word that is not loaded."""
        if unknown := [name for name in names if name not in self.words]:
            there = ", ".join(self.words) or "none"
            raise UsageError(f"no word {unknown[0]!r} is loaded (loaded: {there})")
        self.set({name: word for name, word in self.words.items() if name not in names})

    @contextmanager
    def guests(self, words: Sequence[LoadedWord]) -> Iterator[None]:
        """While open, these words act beside those that the user has loaded, and in place of those of the same name."""
        before = self.words
        taken = {self.key_of(word.name) for word in words}
        kept = {name: word for name, word in before.items() if self.key_of(name) not in taken}
        self.set({**kept, **{word.name: word for word in words}})
        try:
            yield
        finally:
            self.set(before)

    def key_of(self, name: str) -> tuple[Unit, ...]:
        """The same for two names that prompts cannot tell apart. Raises `UsageError` for a name that none can have."""
        return tuple(self._ids_of(component, name) for component in self._tokenizers)

    def _ids_of(self, component: ComponentName, name: str) -> Unit:
        return self._tokenizers[component].ids_of_word(name)


def _clash(name: str, other: str) -> UsageError:
    same = "" if name == other else f", which prompts cannot tell from it: {name!r}"
    return UsageError(
        f"a word {other!r} is loaded already{same}", hint="unload it first, or give this one another name with token"
    )
