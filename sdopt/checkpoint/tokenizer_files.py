"""A tokenizer's folder, as a model brings it: whether its files are what transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdopt.checkpoint.weight_files import follow_link, read_json
from sdopt.errors import CheckpointError

_AGAIN = "download the whole model again"
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def require_tokenizer(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that lacks a tokenizer's files, or whose files are none of a tokenizer."""
    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(
            f"{folder.parent} lacks {folder.name}/vocab.json and {folder.name}/merges.txt", hint=_AGAIN
        )
    if whole.is_file():
        model = read_json(whole).get("model")
        if not isinstance(model, dict) or not _is_vocabulary(model.get("vocab")):
            raise CheckpointError(f"{whole} is not a tokenizer: it has no vocabulary", hint=_AGAIN)
    if vocabulary.is_file() and not _is_vocabulary(read_json(vocabulary)):
        raise CheckpointError(f"{vocabulary} is not a vocabulary: it should give a number to each token", hint=_AGAIN)
    if merges.is_file():
        _require_merges(merges)
    for name in _CONFIGS:
        if (folder / name).is_file():
            read_json(folder / name)


def _is_vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(number) is int for number in value.values())


def _require_merges(path: Path) -> None:
    try:
        lines = follow_link(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a list of merges: it is not UTF-8", hint=_AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    odd = next((line for line in lines if line and "#version" not in line and len(line.split(" ")) != 2), None)
    if odd is not None:
        raise CheckpointError(f"{path} is not a list of merges: it has the line {odd[:60]!r}", hint=_AGAIN)
