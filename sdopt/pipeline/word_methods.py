"""diffusers' methods for textual inversion on pipelines of engines: the same names, arguments and answers.

`with_words` gives them to the class of a pipeline. Words belong to the engines, so pipelines that share engines share
them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdopt.adapters.word_file import PICKLE_PREFIX, WordFile, check_numbers, check_shapes
from sdopt.errors import AdapterError, UsageError
from sdopt.model.component import ComponentName
from sdopt.pipeline.guarded_call import drawing_turn
from sdopt.pipeline.word_files import read_word_file
from sdopt.pipeline.word_stack import LoadedWord, WordStack

# As diffusers calls them, in the order in which it looks.
_FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
_LIBRARY_ARGUMENTS = {"cache_dir", "force_download", "proxies", "local_files_only", "hf_token", "revision", "subfolder",
                      "use_safetensors", "mirror"}  # fmt: skip


def with_words(kind: Any) -> Any:
    """The pipeline's class with methods for words in engines; it keeps its name."""
    members = {name: value for name, value in vars(_WordMethods).items() if not name.startswith("__")}
    members |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def words_of(pipe: Any) -> WordStack:
    """The words of a pipeline's engines."""
    stack = getattr(pipe.unet, "words", None)
    if not isinstance(stack, WordStack):
        raise UsageError("this pipeline was not loaded from a bundle", hint="load one with sdopt.load(folder)")
    return stack


class _WordMethods:
    """Copied into the class of a pipeline; `self` is the pipeline."""

    def load_textual_inversion(
        self, pretrained_model_name_or_path: Any, token: str | Sequence[str | None] | None = None,
        tokenizer: Any = None, text_encoder: Any = None, *, weight_name: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add the words of files, folders, repositories or tables of tensors, one or a list, to the vocabulary.

        `token` is what prompts call it: by default what the file itself does, or else the file's name. With
        `text_encoder` or `tokenizer`, that one alone learns the word. All of a list are added, or none. Raises
        `AdapterError` for what these engines do not take, `UsageError` for a word that is taken.
        """
        if unknown := kwargs.keys() - _LIBRARY_ARGUMENTS:
            raise UsageError(f"load_textual_inversion does not know {', '.join(sorted(unknown))}")
        given = pretrained_model_name_or_path
        sources = list(given) if isinstance(given, (list, tuple)) else [given]
        tokens = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(tokens) != len(sources) or (isinstance(token, str) and len(sources) > 1):
            many = 1 if isinstance(token, str) else len(tokens)
            raise UsageError(
                f"there are {len(sources)} textual inversions and {many} tokens",
                hint="give a token for each, or none",
            )
        stack = words_of(self)
        with drawing_turn(self):
            only = _component_of(self, tokenizer, text_encoder)
            words: list[LoadedWord] = []
            for source, name in zip(sources, tokens, strict=True):
                file = _read(source, weight_name)
                if not (own := name or file.shapes.token or file.path.stem):
                    raise UsageError("tensors without a name stand for no word", hint="give it: token=…")
                words.append(stack.fit(file, own, only))
            stack.add(words)

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Take words away, or all of them. Raises `UsageError` for one that is not loaded."""
        del tokenizer, text_encoder  # a word that one text encoder knows is not known to the other
        stack = words_of(self)
        with drawing_turn(self):
            stack.remove(list(stack.words) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens))


def _component_of(pipe: Any, tokenizer: Any, text_encoder: Any) -> ComponentName | None:
    """Which of the pipeline's text encoders was given, by itself or by its tokenizer; None for all of them."""
    for given, names in ((text_encoder, ("text_encoder", "text_encoder_2")), (tokenizer, ("tokenizer", "tokenizer_2"))):
        if given is None:
            continue
        for name in names:
            if getattr(pipe, name, None) is given:
                return ComponentName(name.replace("tokenizer", "text_encoder"))
        raise UsageError(
            f"the {names[0]} that was given is none of this pipeline", hint=f"give pipe.{names[0]}, or none"
        )
    return None


def _read(source: Any, weight_name: str | None) -> WordFile:
    if isinstance(source, torch.Tensor):
        return _read_table({"*": source})
    if isinstance(source, Mapping):
        return _read_table(source)
    path = Path(os.fspath(source)).expanduser()
    if path.is_dir():
        names = [weight_name] if weight_name else list(_FILE_NAMES)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise AdapterError(f"{path} has no {' or '.join(names)}", hint="say which file it is: weight_name=…")
        path = found[0]
    elif not path.is_file() and "/" in os.fspath(source) and not path.is_absolute():
        path = _download(os.fspath(source), [weight_name] if weight_name else list(_FILE_NAMES))
    return read_word_file(path)


def _read_table(table: Mapping[str, Any]) -> WordFile:
    """A word of tensors that are in memory already, as diffusers takes them."""
    shown, nested = "the table of tensors", table.get("string_to_param")
    if isinstance(nested, Mapping):
        name = table.get("name")
        table = {f"{PICKLE_PREFIX}{name if isinstance(name, str) else key}": value for key, value in nested.items()}
    tensors = {str(key): value.detach().cpu() for key, value in table.items() if isinstance(value, torch.Tensor)}
    shapes = check_shapes(
        {key: tuple(value.shape) for key, value in tensors.items()}, shown,
        [key for key, value in tensors.items() if not value.is_floating_point()],
    )  # fmt: skip
    numbers = {part: tensors[key].float().numpy().copy() for part, key in shapes.parts.items()}
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in numbers.values())).hexdigest()
    return WordFile(Path(), digest, shapes, check_numbers(numbers, shown))


def _download(repository: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise AdapterError(f"cannot fetch {name} of {repository}: {error}") from error
    raise AdapterError(f"{repository} has no {' or '.join(names)}", hint="say which file it is: weight_name=…")
