"""A graph may name any file: what is not a plain range of a plain file beside it is refused before any runtime."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sdopt.errors import ArtifactError, SdoptError, UnsafeInputError
from sdopt.graph.external_data import check_graph_file

DATA = bytes(64)


def external(location: str = "w", offset: str | None = "0", length: str | None = "16", **more: str) -> TensorProto:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": offset, "length": length, **more}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder: Path, tensor: TensorProto) -> Path:
    node = helper.make_node("Add", ["x", "t"], ["y"])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [tensor],
    )  # fmt: skip
    return save_model(folder, helper.make_model(graph))


def save_model(folder: Path, model: onnx.ModelProto) -> Path:
    (folder / "w").write_bytes(DATA)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("tensor", [external(), external(offset="48"), external(offset=None), external(checksum="x")])
def test_a_sound_graph_passes(tensor: TensorProto, tmp_path: Path) -> None:
    assert check_graph_file(save(tmp_path, tensor)).graph.initializer[0] == tensor


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../w",
        "sub/w",
        "./w",
        "..",
        ".",
        "",
        "..\\w",
        "sub\\w",
        "w\0",
        "/w",
        "sub/../w",
        "file:///etc/passwd",
    ],
)
def test_a_place_outside_is_unsafe(location: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w").write_bytes(DATA)
    with pytest.raises(UnsafeInputError):
        check_graph_file(save(tmp_path, external(location)))


RANGES = {
    "negative offset": external(offset="-16"),
    "negative length": external(length="-1"),
    "no length": external(length=None),
    "no number": external(length="many"),
    "empty number": external(offset=""),
    "underscore": external(length="1_6"),
    "space": external(length=" 16"),
    "other digits": external(length="١٦"),
    "float": external(length="16.0"),
    "hexadecimal": external(offset="0x0"),
    "longer than the tensor": external(length="32"),
    "shorter than the tensor": external(length="8"),
    "beyond any file": external(offset="9" * 30),
    "unknown key": external(basepath="/etc"),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_that_lies_is_unsafe(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="'t'"):
        check_graph_file(save(tmp_path, RANGES[name]))


def test_a_place_named_twice_is_unsafe(tmp_path: Path) -> None:
    tensor = external("/etc/passwd")
    tensor.external_data.add(key="location", value="w")
    with pytest.raises(UnsafeInputError, match="twice"):
        check_graph_file(save(tmp_path, tensor))


def test_negative_sides_are_unsafe(tmp_path: Path) -> None:
    tensor = external()
    del tensor.dims[:]
    tensor.dims.extend([-2, -2])
    with pytest.raises(UnsafeInputError):
        check_graph_file(save(tmp_path, tensor))


def test_text_and_unknown_types_are_unsafe(tmp_path: Path) -> None:
    tensor = external()
    tensor.data_type = TensorProto.STRING
    with pytest.raises(UnsafeInputError):
        check_graph_file(save(tmp_path, tensor))


@pytest.mark.parametrize(("offset", "size"), [("49", 64), ("0", 15), ("0", 0), (str(2**40), 64)])
def test_truncated_data_is_damage(offset: str, size: int, tmp_path: Path) -> None:
    path = save(tmp_path, external(offset=offset))
    (tmp_path / "w").write_bytes(bytes(size))
    with pytest.raises(ArtifactError, match="truncated"):
        check_graph_file(path)


def test_missing_data_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, external())
    (tmp_path / "w").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        check_graph_file(path)


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda w, other: w.symlink_to(other),
    "symbolic link to nothing": lambda w, other: w.symlink_to(other.parent / "none"),
    "symbolic link inside": lambda w, other: w.symlink_to("inside"),
    "hard link": lambda w, other: os.link(other, w),
    "folder": lambda w, _: w.mkdir(),
    "pipe": lambda w, _: os.mkfifo(w),
}


@pytest.mark.parametrize("kind", LINKS)
def test_what_is_no_plain_file_is_unsafe(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    path = save(folder, external())
    (folder / "w").rename(folder / "inside")
    (tmp_path / "other").write_bytes(DATA)
    LINKS[kind](folder / "w", tmp_path / "other")
    with pytest.raises(UnsafeInputError):
        check_graph_file(path)


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def graph_of(node: onnx.NodeProto | None = None, **more: list[onnx.TensorProto]) -> onnx.GraphProto:
    return helper.make_graph([node] if node else [], "g", [], [], **more)


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor, dims=[9])


def model_with_function(tensor: TensorProto) -> onnx.ModelProto:
    function = helper.make_function("own", "f", [], ["c"], [constant(tensor)], [helper.make_opsetid("", 23)])
    return helper.make_model(graph_of(), functions=[function])


def model_with_training(tensor: TensorProto) -> onnx.ModelProto:
    model = helper.make_model(graph_of())
    model.training_info.add(initialization=graph_of(initializer=[tensor]))
    return model


PLACES: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "attribute": lambda t: helper.make_model(graph_of(constant(t))),
    "list of an attribute": lambda t: helper.make_model(graph_of(helper.make_node("N", [], ["c"], many=[t]))),
    "branch": lambda t: helper.make_model(
        graph_of(helper.make_node("If", ["x"], ["y"], then_branch=graph_of(constant(t)), else_branch=graph_of()))
    ),
    "initializer of a branch of a branch": lambda t: helper.make_model(
        graph_of(helper.make_node("If", ["x"], ["y"], then_branch=graph_of(
            helper.make_node("N", [], ["y"], many=[graph_of(initializer=[t])]))))
    ),
    "sparse initializer": lambda t: helper.make_model(graph_of(sparse_initializer=[sparse(t)])),
    "sparse attribute": lambda t: helper.make_model(graph_of(helper.make_node("N", [], ["c"], s=sparse(t)))),
    "function": model_with_function,
    "training": model_with_training,
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_no_place_in_a_graph_hides_it(place: str, tmp_path: Path) -> None:
    check_graph_file(save_model(tmp_path, PLACES[place](external())))
    with pytest.raises(UnsafeInputError):
        check_graph_file(save_model(tmp_path, PLACES[place](external("/etc/passwd"))))


@given(st.binary(max_size=300))
def test_noise_is_no_graph(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    path.write_bytes(noise)
    with contextlib.suppress(SdoptError):
        check_graph_file(path)


def test_a_missing_graph_is_damage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(ArtifactError, match="cannot read"):
            check_graph_file(path)
