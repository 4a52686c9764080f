"""Records in the store by their type."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdopt.bundle.records import OutputParity, ParityRecord
from sdopt.disk.shelf import Shelf
from sdopt.disk.store import Store
from sdopt.errors import ArtifactError

KEY = "a" * 64
RECORD = ParityRecord(
    passed=True, runtime="openvino",
    outputs=(OutputParity(name="x", max_abs=1.0, relative_l2=0.5, cosine_distance=0.0),),
    relative_l2_limit=1.0, cosine_distance_limit=1.0,
)  # fmt: skip


def test_a_record_comes_back_as_it_was_and_a_lost_one_is_named(tmp_path: Path) -> None:
    store, shelf = Store(tmp_path), Shelf("parity", ParityRecord)
    assert shelf.find(store, KEY) is None
    shelf.put(store, KEY, RECORD)
    assert shelf.find(store, KEY) == RECORD
    assert shelf.get(Store(tmp_path), KEY) == RECORD
    assert shelf.find(store, "b" * 64) is None
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ArtifactError, match="a parity record vanished"):
        shelf.get(store, KEY)
