"""The weight file: every tensor arrives, in its type, in bounded memory; what cannot be kept is named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sdopt.weights.stream as weights_module
from sdopt.errors import CheckpointError, MissingHardware
from sdopt.model.precision import DType
from sdopt.processes.call import call_by_name
from sdopt.processes.channel import JsonTable
from sdopt.processes.child import peak_rss_bytes
from sdopt.weights.safetensors_header import TensorRef, read_header
from sdopt.weights.stream import WrittenWeights, storage_layout, write_weights
from sdopt.weights.tensor_layout import plan_layout
from sdopt.weights.to_torch import TORCH_DTYPES


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRef]:
    save_file(dict(tensors), path)
    return dict(read_header(path).tensors)


def write(path: Path, tensors: Mapping[str, TensorRef], graph: DType = DType.FP32) -> WrittenWeights:
    return write_weights(path, tensors, graph, label="copying")


kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
contents = st.tuples(kinds, st.lists(st.integers(0, 6), max_size=3))
tables = st.dictionaries(st.text("abcdef.", min_size=1, max_size=6), contents, min_size=1, max_size=8)


@given(tables, st.sampled_from([DType.FP32, DType.FP16, DType.BF16]), st.integers(0, 2**32))
def test_every_tensor_arrives_in_its_storage_type(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[torch.dtype, list[int]]], graph: DType, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    generator = torch.Generator().manual_seed(seed)
    source = {name: (torch.randn(shape, generator=generator) * 9).to(kind) for name, (kind, shape) in table.items()}
    refs = save(folder / "in", source)
    written = write(folder / "out", refs, graph)
    data = (folder / "out").read_bytes()
    assert written == WrittenWeights(hashlib.sha256(data).hexdigest(), len(data))
    result, layout = load_file(folder / "out"), storage_layout(refs, graph)
    assert result.keys() == source.keys()
    for name, tensor in source.items():
        assert result[name].dtype is TORCH_DTYPES[layout[name][0]]
        assert torch.equal(result[name], tensor.to(result[name].dtype)), name
        if graph is DType.FP32 and tensor.dtype is not torch.float64:
            assert result[name].dtype is tensor.dtype, "16 bits stay 16 bits: nothing is gained by more"


def test_a_canonical_file_is_copied_byte_by_byte(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    refs = save(tmp_path / "in", {f"{i}": torch.randn(40, 30, generator=generator) for i in range(9)})
    write(tmp_path / "once", refs)
    write(tmp_path / "twice", read_header(tmp_path / "once").tensors)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()


def test_transposed_matrices_are_turned(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    (ref,) = save(tmp_path / "in", {"w": matrix}).values()
    turned = TensorRef(ref.file, ref.dtype, (4, 3), ref.offset_bytes, transposed=True)
    for graph in (DType.FP32, DType.FP16):
        write(tmp_path / "out", {"w": turned}, graph)
        assert torch.equal(load_file(tmp_path / "out")["w"].float(), matrix.T)


def test_neighbours_are_read_together_and_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet of 686 tensors must not be 686 small reads, nor one of gigabytes."""
    monkeypatch.setattr(weights_module, "_CHUNK_BYTES", 4096)
    sizes: list[int] = []
    read = weights_module._read_exactly

    def counted(descriptor: int, buffer: Any, file: Path) -> None:
        sizes.append(buffer.nbytes)
        read(descriptor, buffer, file)

    monkeypatch.setattr(weights_module, "_read_exactly", counted)
    refs = save(tmp_path / "in", {f"{i:03}": torch.full((10,), float(i)) for i in range(500)})
    write(tmp_path / "out", refs)
    assert len(sizes) == 5
    assert max(sizes) <= 4096
    assert {name: tensor[0].item() for name, tensor in load_file(tmp_path / "out").items()} == {
        f"{i:03}": float(i) for i in range(500)
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("graph", [DType.FP32, DType.FP16])
def test_nan_and_infinity_are_named(bad: float, dtype: torch.dtype, graph: DType, tmp_path: Path) -> None:
    tensors = {name: torch.ones(50, dtype=dtype) for name in ("a", "guilty", "z")}
    tensors["guilty"][49] = bad
    with pytest.raises(CheckpointError, match="'guilty'"):
        write(tmp_path / "out", save(tmp_path / "in", tensors), graph)


@pytest.mark.parametrize("first", [torch.int64, torch.float32])
@pytest.mark.parametrize("second", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_found_behind_a_neighbour_of_another_type(
    first: torch.dtype, second: torch.dtype, tmp_path: Path
) -> None:
    # In the canonical layout these lie side by side, and would be read as one range of the first one's type.
    tensors = {"a": torch.ones(3, dtype=first), "guilty": torch.full((7,), float("nan"), dtype=second)}
    layout = plan_layout(tmp_path / "in", {n: (DType(_short(t.dtype)), tuple(t.shape)) for n, t in tensors.items()})
    body = b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in layout.tensors)
    (tmp_path / "in").write_bytes(layout.header + body)
    with pytest.raises(CheckpointError, match="'guilty'"):
        write(tmp_path / "out", layout.tensors)


def _short(dtype: torch.dtype) -> str:
    return next(ours for ours, theirs in TORCH_DTYPES.items() if theirs is dtype)


def test_integers_that_look_like_nan_pass(tmp_path: Path) -> None:
    tensors = {"ids": torch.full((9,), -1), "w": torch.ones(4)}
    write(tmp_path / "out", save(tmp_path / "in", tensors))
    assert torch.equal(load_file(tmp_path / "out")["ids"], tensors["ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_value_that_fp16_cannot_hold_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(4), "large": torch.tensor([1.0, 70000.0], dtype=dtype)}
    with pytest.raises(CheckpointError, match="'large'") as caught:
        write(tmp_path / "out", save(tmp_path / "in", tensors), DType.FP16)
    assert "fp32" in caught.value.hint


def test_a_float64_beyond_float32_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'huge'"):
        write(tmp_path / "out", save(tmp_path / "in", {"huge": torch.tensor([1e300], dtype=torch.float64)}))


@pytest.mark.parametrize("graph", [DType.FP32, DType.FP16])
def test_a_source_that_shrank_is_named(graph: DType, tmp_path: Path) -> None:
    refs = save(tmp_path / "in", {"a": torch.ones(1000), "b": torch.ones(1000)})
    (tmp_path / "in").write_bytes((tmp_path / "in").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="in is truncated"):
        write(tmp_path / "out", refs, graph)


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    refs = save(tmp_path / "in", {"a": torch.ones(1000)})
    with pytest.raises(MissingHardware, match="full"):
        write(Path("/dev/full"), refs)


_SIDE, _COUNT = 1024, 48


def write_in_child(arguments: JsonTable) -> JsonTable:
    """Write 200 MB and say by how much the process grew."""
    refs = read_header(Path(arguments["source"])).tensors
    small = {"0": refs["0"]}
    write(Path(arguments["out"]), small, DType(arguments["graph"]))
    before = peak_rss_bytes()
    write(Path(arguments["out"]), refs, DType(arguments["graph"]))
    return {"grown_bytes": peak_rss_bytes() - before}


@pytest.mark.parametrize("graph", ["fp32", "fp16"])
def test_memory_is_a_few_buffers_whatever_the_size(graph: str, tmp_path: Path) -> None:
    layout = plan_layout(tmp_path / "in", {f"{i}": (DType.FP32, (_SIDE, _SIDE)) for i in range(_COUNT)})
    with (tmp_path / "in").open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size_bytes)
    outcome = call_by_name(
        "tests.unit.test_weights:write_in_child",
        {"source": str(tmp_path / "in"), "out": str(tmp_path / "out"), "graph": graph},
    )
    assert outcome.value["grown_bytes"] < 80e6 < layout.size_bytes
