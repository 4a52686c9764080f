"""What a plan's first bytes say, against its record. Real plans are in tests/slow/test_check_plans.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.plan_header import RTX_GENERATIONS, PlanHeader, find_contradictions, read_plan_header
from sdopt.errors import ArtifactError
from sdopt.library.identify import inspect_source
from sdopt.preflight.runnable import find_bad_plans
from tests.planted_plans import make_header, make_plan, make_plan_file, write_plan_bundle

# The first 64 bytes of two plans that TensorRT-RTX 1.7.1.116 made of one matrix product; the first streams its weights.
SEEN = {
    "sm89": "76747274000000000200000000000000a41a000000000000010701747674727408000000000000000000000000000000"
    "00000000000000000000000000000000",
    "ampere+": "76747274000000000200000000000000a41a00000000000001070174767472747e000000000000000000000000000000"
    "00000000000000000002000000000000",
}


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.plan"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("generation", "weights_bytes"), [("sm89", 0), ("ampere+", 512)])
def test_headers_as_tensorrt_wrote_them(generation: str, weights_bytes: int, tmp_path: Path) -> None:
    header = read_plan_header(written(tmp_path, bytes.fromhex(SEEN[generation])))
    assert header == PlanHeader("tensorrt-rtx", "1.7.1.116", generation, 6820, weights_bytes)


@pytest.mark.parametrize(("generation", "bits"), [*RTX_GENERATIONS.items(), ("ampere+", 0x7E), ("sm86,sm89", 0x0C)])
def test_every_generation_has_its_bit(generation: str, bits: int, tmp_path: Path) -> None:
    header = read_plan_header(written(tmp_path, make_header(bits=bits)))
    assert header is not None
    assert (header.flavour, header.version, header.generation) == ("tensorrt-rtx", "1.7.1.116", generation)
    assert (header.size_bytes, header.weights_bytes) == (4096, 512)


def test_of_general_tensorrt_only_the_magic_is_known(tmp_path: Path) -> None:
    header = read_plan_header(written(tmp_path, b"ftrt" + bytes(100)))
    assert header is not None
    assert (header.flavour, header.version, header.size_bytes) == ("tensorrt", "", None)


@pytest.mark.parametrize("data", [b"", b"vtrt", make_header()[:-1]])
def test_a_file_without_room_for_a_header_is_no_plan(data: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    with pytest.raises(ArtifactError, match=f"it has {len(data)} bytes"):
        read_plan_header(path)
    assert find_contradictions(tmp_path, make_plan(file="x.plan")) == [
        f"x.plan is not a plan of TensorRT: it has {len(data)} bytes"
    ]


def test_a_missing_file_is_an_error_of_sdopt(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        read_plan_header(tmp_path / "none.plan")


@pytest.mark.parametrize("data", [b"\x08" * 64, make_header(layout=3), b"PK\x03\x04".ljust(64)])
def test_another_layout_is_unknown(data: bytes, tmp_path: Path) -> None:
    assert read_plan_header(written(tmp_path, data)) is None


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "truncated": ({"size_bytes": 9000}, {}, "x.plan has 4096 bytes, and its own header says 9000"),
    "another version": ({"version": "1.6.0.54"}, {}, "is of tensorrt-rtx 1.6.0.54, and the manifest says 1.7.1.116"),
    "another generation": ({"bits": 0x10}, {}, "is for sm120, and the manifest says sm89"),
    "portable": ({"bits": 0x7E}, {}, "is for ampere+, and the manifest says sm89"),
    "no generation at all": ({"bits": 0}, {}, "is for no generation that is known, and the manifest says sm89"),
    "another flavour": ({}, {"flavour": "tensorrt"}, "is a plan of tensorrt-rtx, and the manifest says tensorrt"),
    "no plan": ({"magic": b"onnx"}, {}, "does not begin as a plan of TensorRT-RTX 1.7.1.116 does"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_plan_that_is_not_what_its_record_says(name: str, tmp_path: Path) -> None:
    header, record, said = CONTRADICTIONS[name]
    written(tmp_path, make_plan_file(**header))
    (found,) = find_contradictions(tmp_path, make_plan(file="x.plan", **record))
    assert said in found


def test_what_fits_contradicts_nothing(tmp_path: Path) -> None:
    written(tmp_path, make_plan_file())
    assert find_contradictions(tmp_path, make_plan(file="x.plan")) == []
    written(tmp_path, make_plan_file(version="1.9.2.1"))
    assert find_contradictions(tmp_path, make_plan(file="x.plan", version="1.9.2.257")) == [], "a byte holds 257 as 1"


def test_unknown_headers_of_other_versions_are_no_error(tmp_path: Path) -> None:
    written(tmp_path, bytes(4096))
    assert find_contradictions(tmp_path, make_plan(file="x.plan", version="2.0.0.1")) == []
    assert find_contradictions(tmp_path, make_plan(file="x.plan", flavour="tensorrt", version="10.13.3.9")) == []


def test_a_plan_needs_a_digest_and_the_place_of_its_component(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    manifest = write_plan_bundle(folder, {"unet/sm89.plan": make_plan_file()}, [make_plan()])
    assert find_bad_plans(folder, manifest) == []
    assert find_bad_plans(folder, manifest.model_copy(update={"files": {}})) == [
        "the manifest has no digest of unet/sm89.plan in the folder of unet"
    ]
    elsewhere = write_plan_bundle(
        tmp_path / "c", {"vae_decoder/x.plan": make_plan_file()}, [make_plan(file="vae_decoder/x.plan")]
    )
    assert "in the folder of unet" in find_bad_plans(tmp_path / "c", elsewhere)[0]
    assert find_bad_plans(tmp_path / "d", write_plan_bundle(tmp_path / "d", {}, [])) == [
        "the manifest names no plan of unet"
    ]


def test_inspect_says_what_a_plan_is(tmp_path: Path) -> None:
    table = inspect_source(str(written(tmp_path, make_plan_file(size_bytes=5000))))
    digest = table.pop("sha256")
    assert len(digest) == 64
    assert table == {
        "kind": "plan", "bytes": 4096, "flavour": "tensorrt-rtx", "version": "1.7.1.116", "generation": "sm89",
        "weights_bytes": 512, "damage": "its own header says 5000 bytes",
    }  # fmt: skip
    assert "unknown" in inspect_source(str(written(tmp_path, bytes(100))))["flavour"]
