"""The folder for optimum's ONNX Runtime pipelines; `benchmarks/optimum_check.py` draws with optimum itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdopt.bundle.manifest import read_manifest
from sdopt.disk.file_records import find_damage
from sdopt.errors import ArtifactError
from sdopt.export.optimum import export_optimum
from sdopt.export.published_folder import MARKER_NAME
from sdopt.model.file_names import MANIFEST_NAME
from tests.unit.test_export_triton import add_plans


def test_everything_but_sdopt_s_own_is_there(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, ("sm89", "tensorrt-rtx", 0))
    done = export_optimum(bundle, tmp_path / "o")
    assert done.pipeline == "StableDiffusionPipeline"
    files = read_manifest(bundle).files
    kept = {name: record for name, record in files.items() if not name.endswith((".plan", "README.md"))}
    assert find_damage(tmp_path / "o", kept) == []
    found = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert found == {*kept, "README.md", MARKER_NAME}
    assert MANIFEST_NAME not in found
    card = (tmp_path / "o" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "sdopt.load" not in card


def test_a_bundle_is_never_replaced_by_its_own_export(bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    with pytest.raises(ArtifactError, match="not an earlier sdopt export optimum"):
        export_optimum(bundle, bundle)
    assert sorted(bundle.rglob("*")) == before
