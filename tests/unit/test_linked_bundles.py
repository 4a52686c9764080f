"""Bundles as a hub's cache keeps them: every file a link to a blob. They open, by bytes that were hashed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import read_manifest
from sdopt.errors import ArtifactError
from sdopt.preflight.check import check_bundle
from sdopt.preflight.runnable import require_sound


@pytest.fixture
def bundle(tmp_path: Path, pristine_bundle: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(pristine_bundle, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def link_to_blobs(bundle: Path, cache: Path) -> Path:
    """The bundle as `huggingface_hub` lays a repository out."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "c0ffee", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            place = snapshot / path.relative_to(bundle)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


def test_a_plain_bundle_is_opened_where_it_is(bundle: Path, cache: Path) -> None:
    assert open_links(bundle) == bundle
    assert not (cache / "linked-bundles").exists()


def test_a_bundle_of_links_is_whole_and_opens(bundle: Path, tmp_path: Path) -> None:
    snapshot = link_to_blobs(bundle, tmp_path / "hub")
    opened = open_links(snapshot)
    assert opened != snapshot
    assert not any(path.is_symlink() for path in opened.rglob("*"))
    require_sound(opened, read_manifest(opened))
    assert check_bundle(snapshot).problems == ()
    assert open_links(snapshot) == opened, "made once"


def test_a_linked_bundle_draws_what_the_plain_one_draws(bundle: Path, tmp_path: Path) -> None:
    import numpy as np

    import sdopt
    from sdopt.pipeline.load import close_engines

    pictures = []
    for folder in (bundle, link_to_blobs(bundle, tmp_path / "hub")):
        pipe = sdopt.load(folder)
        pipe.set_progress_bar_config(disable=True)
        latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
        import torch

        drawn = pipe("a red circle", num_inference_steps=2, latents=torch.from_numpy(latents), output_type="np")
        pictures.append(drawn.images)
        close_engines(pipe)
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize("name", ["unet/weights.safetensors", "unet/model.onnx", "scheduler/scheduler_config.json"])
def test_a_blob_with_other_bytes_is_damage(name: str, bundle: Path, tmp_path: Path) -> None:
    snapshot = link_to_blobs(bundle, tmp_path / "hub")
    blob = (snapshot / name).resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} links to .*differs from the manifest"):
        open_links(snapshot)
    with pytest.raises(ArtifactError):
        check_bundle(snapshot)


def test_a_link_to_nothing_is_damage(bundle: Path, tmp_path: Path) -> None:
    snapshot = link_to_blobs(bundle, tmp_path / "hub")
    (snapshot / "unet" / "model.onnx").resolve().unlink()
    with pytest.raises(ArtifactError, match=r"unet/model\.onnx is missing"):
        open_links(snapshot)


def test_a_folder_that_is_a_link_counts(bundle: Path, tmp_path: Path) -> None:
    (bundle / "unet").rename(tmp_path / "elsewhere")
    (bundle / "unet").symlink_to(tmp_path / "elsewhere")
    opened = open_links(bundle)
    assert (opened / "unet" / "model.onnx").read_bytes() == (tmp_path / "elsewhere" / "model.onnx").read_bytes()
    assert not (opened / "unet").is_symlink()


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_the_card_is_for_people_and_damages_no_engine(change: str, bundle: Path) -> None:
    card = bundle / "README.md"
    if change == "changed":
        card.write_text("my notes")
    else:
        card.unlink()
    require_sound(bundle, read_manifest(bundle))
    report = check_bundle(bundle)
    assert report.problems == ()
    assert any("README.md" in note for note in report.notes)


def test_files_that_the_manifest_does_not_know_are_told(bundle: Path) -> None:
    assert check_bundle(bundle).notes == ()
    (bundle / "unet" / "extra.bin").write_bytes(b"x")
    (bundle / "notes.txt").write_text("x")
    (note,) = check_bundle(bundle).notes
    assert "notes.txt" in note
    assert "unet/extra.bin" in note


def test_a_manifest_cannot_lead_a_copy_out_of_its_folder(bundle: Path, tmp_path: Path) -> None:
    from sdopt.errors import UnsafeInputError

    snapshot = link_to_blobs(bundle, tmp_path / "hub")
    place = snapshot / "bundle.json"
    text = place.read_text().replace('"unet/model.onnx"', '"../../outside.onnx"')
    place.unlink()
    place.write_text(text)
    with pytest.raises(UnsafeInputError):
        open_links(snapshot)
