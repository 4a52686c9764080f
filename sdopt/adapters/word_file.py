"""Textual inversion: files and tables of vectors that stand for a word. numpy, no torch; safetensors only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdopt.adapters.adapter_file import TEXT_WIDTHS
from sdopt.adapters.header import DOWNLOAD_AGAIN, open_header
from sdopt.adapters.tensor_bytes import Array, TensorReader
from sdopt.errors import AdapterError, SdoptError
from sdopt.model.family import Family
from sdopt.weights.safetensors_header import TensorRef

MOST_VECTORS = 75
"""Of one word: no end of a chunk parts them, and a chunk has no more places."""
PICKLE_PREFIX = "string_to_param/"
"""How the sandbox names the vectors of A1111's pickles: this, and the word that was trained."""
_PARTS = ("clip_l", "clip_g")
_WIDEST = 8192
# What the vectors of nobody's word are called.
_NAMELESS = ("", "*")


@dataclass(frozen=True)
class WordShapes:
    """What a file or a table holds, before its numbers are read. `token` is its own name for the word, or "".

    `parts` are the names of its tensors by text encoder: `clip_l` and `clip_g` of SDXL, or "" of any one.
    """

    writer: str
    token: str
    parts: Mapping[str, str]
    vectors: int
    widths: Mapping[str, int]

    @property
    def family(self) -> Family | None:
        """Of the model that it was trained on, as the widths say."""
        if len(self.parts) > 1 or _PARTS[1] in self.parts:
            return Family.SDXL
        return TEXT_WIDTHS.get(next(iter(self.widths.values())))


@dataclass(frozen=True)
class WordFile:
    """A word that was read: fp32 [vectors, width] by text encoder, as in `WordShapes.parts`."""

    path: Path
    sha256: str
    shapes: WordShapes
    vectors: Mapping[str, Array]

    @property
    def shown(self) -> str:
        """What messages call it; tensors that are in no file have no path."""
        return "the table of tensors" if self.path == Path() else str(self.path)


def is_word(path: Path) -> bool:
    """Whether a safetensors file holds a word, sound or not. False for what cannot be read."""
    try:
        return _find_parts({key: ref.shape for key, ref in open_header(path).tensors.items()}) is not None
    except SdoptError:
        return False


def read_shapes(path: Path, shown: Path) -> WordShapes:
    """From the header alone. Raises `AdapterError` for a file that is something else, or cannot be a word."""
    tensors = open_header(path).tensors
    return check_shapes(
        {key: ref.shape for key, ref in tensors.items()}, str(shown), [k for k, r in tensors.items() if _is_odd(r)]
    )


def _is_odd(ref: TensorRef) -> bool:
    return not ref.dtype.is_float


def read_word(path: Path, shown: Path, sha256: str) -> WordFile:
    """Read a safetensors file. `shown` is what the user calls it. Raises `AdapterError`, also for NaN."""
    shapes = read_shapes(path, shown)
    tensors = open_header(path).tensors
    with TensorReader(path) as reader:
        vectors = {part: reader.read(tensors[key]) for part, key in shapes.parts.items()}
    return WordFile(shown, sha256, shapes, check_numbers(vectors, str(shown)))


def check_numbers(vectors: Mapping[str, Array], shown: str) -> dict[str, Array]:
    """The vectors as [vectors, width]. Raises `AdapterError` for NaN and infinity."""
    for part, value in vectors.items():
        if not np.isfinite(value).all():
            where = f" in {part}" if part else ""
            raise AdapterError(f"{shown} has NaN or infinity{where}", hint="train it again, or take another file")
    return {part: value.reshape(-1, value.shape[-1]) for part, value in vectors.items()}


def check_shapes(shapes: Mapping[str, tuple[int, ...]], shown: str, odd: list[str]) -> WordShapes:
    """What these tensors are as a word; `odd` are those that are no floating-point numbers. Raises `AdapterError`."""
    found = _find_parts(shapes)
    if found is None:
        raise AdapterError(
            f"{shown} is not a textual inversion: it has {len(shapes)} tensors, "
            f"among them {min(shapes, default='')[:60]!r}",
            hint="give a file with emb_params, with clip_l and clip_g, or with one tensor that is called as its word",
        )
    writer, token, parts = found
    widths, counts = {}, set()
    for part, key in parts.items():
        shape = shapes[key]
        many, width = (1, *shape)[-2:] if len(shape) in (1, 2) else (0, 0)
        if key in odd or not 0 < width <= _WIDEST:
            raise AdapterError(
                f"{shown}: {key[:60]!r} of the shape {list(shape)} is not a list of vectors", hint=DOWNLOAD_AGAIN
            )
        widths[part] = width
        counts.add(many)
    if len(counts) > 1:
        raise AdapterError(f"{shown} has {min(counts)} vectors for one text encoder and {max(counts)} for the other",
                           hint=DOWNLOAD_AGAIN)  # fmt: skip
    vectors = counts.pop()
    if not vectors:
        raise AdapterError(f"{shown} has no vectors, so that its word stands for nothing", hint=DOWNLOAD_AGAIN)
    if vectors > MOST_VECTORS:
        raise AdapterError(
            f"{shown} has {vectors} vectors, and a part of a prompt that is encoded together has {MOST_VECTORS} places",
            hint=f"train the word with {MOST_VECTORS} vectors or fewer; most have 1 to 16",
        )
    return WordShapes(writer, token, parts, vectors, widths)


def _find_parts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, dict[str, str]] | None:
    """(writer, own token, tensors by text encoder), or None for tensors of something else."""
    keys = list(shapes)
    if keys and set(keys) <= set(_PARTS):
        return "A1111 (SDXL)", "", {part: part for part in _PARTS if part in shapes}
    if len(keys) != 1:
        return None
    key = keys[0]
    if key == "emb_params":
        return "A1111", "", {"": key}
    if key.startswith(PICKLE_PREFIX):
        token = key.removeprefix(PICKLE_PREFIX)
        return "A1111", "" if token in _NAMELESS else token, {"": key}
    # A single weight of a network is no word: its name has dots.
    if (
        len(shapes[key]) > 2
        or math.prod(shapes[key]) > MOST_VECTORS * _WIDEST * 4
        or key.endswith((".weight", ".bias"))
    ):
        return None
    return "diffusers", "" if key in _NAMELESS else key, {"": key}
