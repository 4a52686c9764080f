"""safetensors headers: what the library writes is read, what we plan the library reads, what lies is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sdopt.errors import CheckpointError, SdoptError, UnsafeInputError
from sdopt.model.precision import DType
from sdopt.weights.safetensors_header import read_header
from sdopt.weights.tensor_layout import plan_layout
from sdopt.weights.to_torch import TORCH_DTYPES, read_tensor

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
contents = st.dictionaries(names, st.tuples(st.sampled_from(DType), shapes), max_size=6)


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(contents)
def test_the_canonical_layout_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[DType, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "canonical.safetensors"
    layout = plan_layout(path, tensors)
    body = bytes(i % 2 for i in range(layout.size_bytes - len(layout.header)))  # 0 and 1 are valid bools
    path.write_bytes(layout.header + body)
    assert dict(read_header(path).tensors) == dict(layout.tensors)
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == tensors.keys()
        for name, (dtype, shape) in tensors.items():
            expected = library.get_tensor(name)
            assert expected.dtype is TORCH_DTYPES[dtype]
            assert tuple(expected.shape) == shape
            ours = read_tensor(layout.tensors[name])
            assert ours.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist() if shape else True


@given(contents, st.randoms())
def test_the_layout_depends_on_the_content_alone(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], random: Any
) -> None:
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    first, second = plan_layout(Path("a"), tensors), plan_layout(Path("b"), dict(shuffled))
    assert (first.header, first.size_bytes) == (second.header, second.size_bytes)
    assert len(first.header) % 4096 == 0
    for ref in first.tensors.values():
        assert ref.offset_bytes % ref.dtype.itemsize_bytes == 0, "a runtime maps it as its type"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "é": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x", metadata={"who": "test"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"who": "test"}
    for name, ref in header.tensors.items():
        assert torch.equal(read_tensor(ref), tensors[name])


TWO = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
BAD = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), UnsafeInputError),
    "the same range twice": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8), UnsafeInputError),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), UnsafeInputError),
    "hole at the start": ({"a": entry([1], 4, 8)}, bytes(8), UnsafeInputError),
    "bytes after the end": (TWO, bytes(13), UnsafeInputError),
    "truncated": (TWO, bytes(11), CheckpointError),
    "negative begin": ({"a": entry([2], -8, 0)}, bytes(8), UnsafeInputError),
    "end before begin": ({"a": entry([2], 8, 0)}, bytes(8), UnsafeInputError),
    "shape and range differ": ({"a": entry([3], 0, 8)}, bytes(8), UnsafeInputError),
    "negative side": ({"a": entry([-2, -1], 0, 8)}, bytes(8), UnsafeInputError),
    "fraction": ({"a": entry([2], 0, 8.0)}, bytes(8), UnsafeInputError),
    "text for a side": ({"a": entry(["2"], 0, 8)}, bytes(8), UnsafeInputError),
    "no range": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), UnsafeInputError),
    "entry is a list": ({"a": []}, b"", UnsafeInputError),
    "metadata is a list": ({"__metadata__": ["x"]}, b"", UnsafeInputError),
    "huge side": ({"a": entry([2**62, 2**62], 0, 8)}, bytes(8), UnsafeInputError),
    "range far beyond the end": ({"a": entry([2**40], 0, 2**42)}, bytes(8), CheckpointError),
    "unknown type": ({"a": entry([8], 0, 8, "F4")}, bytes(8), CheckpointError),
    "duplicate key": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
                      b'"data_offsets":[0,1]}}', b"x", UnsafeInputError),
    "duplicate key in an entry": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x",
                                  UnsafeInputError),
    "no json": (b"{", b"", CheckpointError),
    "no text": (b"\xff\xfe{}", b"", CheckpointError),
    "no table": (b"[]", b"", CheckpointError),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", CheckpointError),
    "number of 5000 digits": (b'{"a":' + b"1" * 5000 + b"}", b"", CheckpointError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    header, data, kind = BAD[name]
    path = write(tmp_path / "x", header, data)
    with pytest.raises(SdoptError) as caught:
        read_header(path)
    assert type(caught.value) is kind
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"duplicate key"}))
def test_the_library_refuses_the_same(name: str, tmp_path: Path) -> None:
    """It takes a duplicate key; anything else that only we refuse would be a checkpoint that users cannot convert."""
    header, data, _ = BAD[name]
    path = write(tmp_path / "x", header, data)
    with pytest.raises((SafetensorError, OSError)):
        load_file(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_length_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"{size} bytes"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 50])
def test_a_header_longer_than_the_file_is_refused_without_memory(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(write(tmp_path / "x", {}, bytes(10), length=length))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_header(path)


@given(st.binary(max_size=200), st.integers(0, 1))
def test_noise_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, noise: bytes, framed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes((struct.pack("<Q", len(noise)) if framed else b"") + noise)
    try:
        tensors = read_header(path).tensors
    except SdoptError:
        return
    assert sum(math.prod(ref.shape) * ref.dtype.itemsize_bytes for ref in tensors.values()) <= path.stat().st_size


def test_reading_a_tensor_of_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x")
    ref = read_header(tmp_path / "x").tensors["a"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensor(ref)
