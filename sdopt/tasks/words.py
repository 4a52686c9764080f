"""The words of textual inversions that a request asks for, as files that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.errors import AdapterError, UsageError
from sdopt.model.lora import WordUse
from sdopt.model.request import DrawRequest

if TYPE_CHECKING:
    from sdopt.pipeline.word_stack import LoadedWord


def choose_words(places: Sequence[Path], request: DrawRequest) -> tuple[WordUse, ...]:
    """The files that are named, and of folders those whose word is in one of the request's prompts.

    Raises `UsageError` for a place that is neither.
    """
    text = f"{request.prompt}\n{request.negative_prompt or ''}".casefold()
    chosen: dict[str, WordUse] = {}
    for place in places:
        if place.is_dir():
            files = [path for path in _list_files(place) if any(name.casefold() in text for name in _names_in(path))]
        elif place.is_file():
            files = [place]
        else:
            raise UsageError(
                f"there is no textual inversion {place}", hint="--embedding takes a file, or a folder of them"
            )
        chosen |= {str(path): WordUse(source=str(path)) for path in files}
    return tuple(chosen.values())


def _list_files(folder: Path) -> Iterator[Path]:
    from sdopt.pipeline.word_files import SUFFIXES

    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def _names_in(path: Path) -> tuple[str, ...]:
    """Of a file in a folder, which may hold other things: a pickle has only the file's name, as in A1111."""
    from sdopt.adapters.word_file import is_word

    if path.suffix.lower() != ".safetensors":
        return (path.stem,)
    return names_of(path) if is_word(path) else ()


def names_of(path: Path) -> tuple[str, ...]:
    """What prompts may call the word of a file: by the file's name, and as the file itself does.

    Raises `AdapterError` for a file that is missing or holds no word.
    """
    from sdopt.pipeline.word_files import read_word_shapes

    token = read_word_shapes(path).token
    return (path.stem,) if token.casefold() in ("", path.stem.casefold()) else (path.stem, token)


def list_names(request: DrawRequest) -> tuple[str, ...]:
    """Every name of the words that a request asks for. Raises as `names_of` does."""
    return tuple(name for use in request.embeddings for name in names_of(_path_of(use)))


def load_words(
    pipe: Any, request: DrawRequest, expected: Mapping[str, str]
) -> tuple[tuple[WordUse, ...], tuple[LoadedWord, ...]]:
    """What the request asks for, with the files' digests, and as the pipeline's engines take it.

    `expected` are digests by the file's name without its ending. Raises `AdapterError` for a file that is missing, that
    the engines do not take, or that is another than was expected.
    """
    if not request.embeddings:
        return (), ()
    from sdopt.pipeline.word_files import read_word_file
    from sdopt.pipeline.word_methods import words_of

    stack = words_of(pipe)
    used: list[WordUse] = []
    loaded: dict[str, LoadedWord] = {}
    others: dict[str, LoadedWord] = {}
    for use in request.embeddings:
        path = _path_of(use)
        file = read_word_file(path)
        wanted = use.sha256 or expected.get(path.stem, "")
        if wanted not in ("", file.sha256):
            raise AdapterError(
                f"{path} is another file than the word {path.stem!r} that the picture was drawn with",
                hint="put the file of that picture in its place, or give the prompt and leave out --from-image",
            )
        name, *own = names_of(path)
        if name in loaded:
            raise UsageError(f"two textual inversions are called {name!r}", hint="rename one of the files")
        loaded[name] = stack.fit(file, name)
        others |= {each: stack.fit(file, each) for each in own}
        used.append(use.model_copy(update={"sha256": file.sha256}))
    # The name of a file goes before what another calls itself.
    taken = {stack.key_of(name) for name in loaded}
    for name, word in others.items():
        if stack.key_of(name) not in taken:
            taken.add(stack.key_of(name))
            loaded[name] = word
    return tuple(used), tuple(loaded.values())


def _path_of(use: WordUse) -> Path:
    return Path(use.source).expanduser()


def active_words(pipe: Any, words: Sequence[LoadedWord]) -> AbstractContextManager[None]:
    """While open, these words act beside the user's own."""
    if not words:
        return nullcontext()
    from sdopt.pipeline.word_methods import words_of

    return words_of(pipe).guests(words)
