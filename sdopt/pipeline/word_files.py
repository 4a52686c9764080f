"""Files of textual inversion, as they are found: safetensors are read here, pickles by the sandbox."""

from __future__ import annotations

from pathlib import Path

from sdopt.adapters.word_file import WordFile, WordShapes, is_word, read_shapes, read_word
from sdopt.checkpoint.pickle_sandbox import convert_pickle
from sdopt.disk.files import hash_file
from sdopt.errors import AdapterError, CheckpointError, SdoptError

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt", ".pth")
_PICKLES = SUFFIXES[1:]
# 75 vectors of SDXL in fp32 are 0.6 MB; A1111 keeps the state of training in other files.
_LIMIT_BYTES = 64_000_000


def read_word_file(path: Path) -> WordFile:
    """Raises `AdapterError` for a file that holds no word, `UnsafeInputError` for a pickle that wants to run code."""
    _require_file(path)
    return read_word(_as_safetensors(path), path, hash_file(path))


def read_word_shapes(path: Path) -> WordShapes:
    """What a file holds, without its numbers. Raises as `read_word_file` does."""
    _require_file(path)
    return read_shapes(_as_safetensors(path), path)


def is_word_file(path: Path) -> bool:
    """Whether a file holds a word, sound or not; a pickle is read in the sandbox for it. False for any other thing."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file() or path.stat().st_size > _LIMIT_BYTES:
        return False
    try:
        return is_word(_as_safetensors(path))
    except SdoptError:
        return False


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise AdapterError(f"there is no textual inversion {path}", hint=f"give a file that ends in {_ends()}")
    if path.suffix.lower() not in SUFFIXES:
        raise AdapterError(f"{path} is not a textual inversion by its name", hint=f"give a file that ends in {_ends()}")
    if path.stat().st_size > _LIMIT_BYTES:
        raise AdapterError(
            f"{path} has {path.stat().st_size / 1e6:.0f} MB, and the vectors of a word have less than 1",
            hint="give the textual inversion, and not the model",
        )


def _ends() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _as_safetensors(path: Path) -> Path:
    if path.suffix.lower() not in _PICKLES:
        return path
    try:
        return convert_pickle(path, of_word=True)
    except CheckpointError as error:
        raise AdapterError(f"{error.message}, so that it is no textual inversion", hint=error.hint) from error
