"""`bundle.json`: an API. It round-trips, each defect has its own message, and a change of the format is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.damage import require_intact
from sdopt.bundle.manifest import SCHEMA_VERSION, BundleKind, BundleManifest, read_manifest, write_manifest
from sdopt.disk.digest import FileRecord
from sdopt.disk.file_records import find_damage, record_file
from sdopt.disk.files import hash_file
from sdopt.errors import ArtifactError, UnsafeInputError
from sdopt.model.family import Family
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.task import Task
from sdopt.pipeline.opened import OpenedBundle
from tests.reference_session import make_bundle

GOLDEN = Path(__file__).parent.parent / "golden" / "bundle.schema.json"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> BundleManifest:
    record = FileRecord(sha256="0" * 64, size_bytes=3)
    made = make_bundle(tmp_path_factory.mktemp("bundle") / "b").manifest
    return made.model_copy(update={"files": {"unet/model.onnx": record}})


def test_it_round_trips(manifest: BundleManifest, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_the_format_is_the_one_that_is_written_down() -> None:
    """If this fails, the format changed: raise SCHEMA_VERSION unless old readers and old files still do.

    Then write the schema anew: python -m tests.unit.test_manifest
    """
    assert BundleManifest.model_json_schema() == json.loads(GOLDEN.read_bytes())


def edited(manifest: BundleManifest, edit: Callable[[dict[str, Any]], object]) -> bytes:
    table = json.loads(manifest.to_json())
    edit(table)
    return json.dumps(table).encode()


Edit = Callable[[dict[str, Any]], object]
NEWER = SCHEMA_VERSION + 1
DEFECTS: dict[str, tuple[Edit, str]] = {
    "newer schema": (lambda t: t.update(schema_version=NEWER, news=1), rf"has schema {NEWER}"),
    "older schema": (lambda t: t.update(schema_version=0), r"schema_version"),
    "no schema": (lambda t: t.pop("schema_version") and t.update(schema_version=None), r"schema_version"),
    "unknown key": (lambda t: t.update(colour="red"), r"colour"),
    "unknown key inside": (lambda t: t["source"].update(colour="red"), r"source\.colour"),
    "a key of schema 5": (lambda t: t.update(inpainting=False), r"inpainting"),
    "unknown kind": (lambda t: t.update(kind="motion"), r"kind"),
    "unknown task": (lambda t: t.update(tasks=["upscale"]), r"tasks\.0"),
    "a pipeline without tasks": (lambda t: t.update(tasks=[]), r"tasks: a pipeline has at least one"),
    "a task of another family": (lambda t: t.update(family="sdxl-refiner"), r"tasks: sdxl-refiner has no text"),
    "latents of no size": (lambda t: t.update(pixels_per_latent=0), r"pixels_per_latent"),
    "missing key": (lambda t: t.pop("profile"), r"profile"),
    "unknown component": (lambda t: t["components"].update(head=t["components"]["unet"]), r"components\.head"),
    "unknown precision": (lambda t: t["components"]["unet"].update(precision="fp12"), r"components\.unet\.precision"),
    "unknown backend": (lambda t: t["components"]["unet"].update(backend={"kind": "abacus"}), r"unet\.backend"),
    "digest is not a digest": (lambda t: t["files"]["unet/model.onnx"].update(sha256="00"), r"sha256"),
    "negative size": (lambda t: t["files"]["unet/model.onnx"].update(size_bytes=-1), r"size_bytes"),
    "impossible profile": (lambda t: t["profile"]["batch"].update(min=5, opt=1, max=1), r"profile"),
}  # fmt: skip


def to_schema_5(table: dict[str, Any], *, inpainting: bool = False) -> None:
    """What sdopt wrote before bundles had kinds and tasks."""
    table.update(schema_version=5, inpainting=inpainting)
    del table["kind"], table["tasks"], table["pixels_per_latent"]


def to_schema_4(table: dict[str, Any]) -> None:
    """Before averaged weights."""
    to_schema_5(table)
    table["schema_version"] = 4
    del table["recipe"]["ema"]


def to_schema_3(table: dict[str, Any]) -> None:
    """Before the build's time."""
    to_schema_4(table)
    table["schema_version"] = 3
    del table["build"]


def to_schema_1(table: dict[str, Any]) -> None:
    """Before plans: one profile, no reason for a precision."""
    to_schema_3(table)
    table["schema_version"] = 1
    del table["profiles"]
    for part in table["components"].values():
        del part["plans"], part["precision_reason"]


AGES: dict[str, Edit] = {"1": to_schema_1, "3": to_schema_3, "4": to_schema_4, "5": to_schema_5}


def write_vae_config(folder: Path, content: str) -> None:
    (folder / "vae_decoder").mkdir()
    (folder / "vae_decoder" / "config.json").write_text(content)


@pytest.mark.parametrize("age", AGES)
def test_a_bundle_of_an_older_schema_is_read(age: str, manifest: BundleManifest, tmp_path: Path) -> None:
    """What it did not know is empty, and the size of its latents is that of its VAE."""
    assert manifest.build is None
    assert not manifest.recipe.ema
    assert manifest.pixels_per_latent is not None
    levels = manifest.pixels_per_latent.bit_length()
    write_vae_config(tmp_path, json.dumps({"block_out_channels": [32] * levels}))
    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, AGES[age]))
    assert read_manifest(tmp_path) == manifest


def test_pictures_of_an_older_bundle_name_it_by_its_file(manifest: BundleManifest, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, to_schema_5))
    opened = OpenedBundle(tmp_path, read_manifest(tmp_path), {})
    assert opened.digest == hash_file(tmp_path / MANIFEST_NAME)
    write_manifest(tmp_path, manifest)
    assert OpenedBundle(tmp_path, read_manifest(tmp_path), {}).digest == hash_file(tmp_path / MANIFEST_NAME)


@pytest.mark.parametrize("inpainting", [False, True], ids=["latents", "mask"])
@pytest.mark.parametrize("family", Family)
def test_tasks_of_an_older_bundle_are_those_of_its_model(
    family: Family, inpainting: bool, manifest: BundleManifest, tmp_path: Path
) -> None:
    def age(table: dict[str, Any]) -> None:
        to_schema_5(table, inpainting=inpainting)
        table["family"] = family

    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, age))
    read = read_manifest(tmp_path)
    assert read.kind is BundleKind.PIPELINE
    assert (Task.TEXT_TO_IMAGE in read.tasks) == (not inpainting and family is not Family.SDXL_REFINER)
    assert (read.tasks == (Task.INPAINT,)) == inpainting


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"block_out_channels": []}', '{"block_out_channels": 3}'])
def test_an_older_bundle_with_a_damaged_config_is_still_read(
    content: str, manifest: BundleManifest, tmp_path: Path
) -> None:
    """So that `sdopt check` can name the file, and `--again` read the recipe."""
    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, to_schema_5))
    assert read_manifest(tmp_path).pixels_per_latent is None
    write_vae_config(tmp_path, content)
    assert read_manifest(tmp_path).pixels_per_latent is None
    with pytest.raises(ArtifactError, match="how large its latents are"):
        read_manifest(tmp_path).require_pixels_per_latent()


def test_the_config_of_an_older_bundle_is_not_read_through_a_link(manifest: BundleManifest, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, to_schema_5))
    (tmp_path / "vae_decoder").mkdir()
    (tmp_path / "vae_decoder" / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", ["family", "inpainting"])
def test_what_an_older_bundle_lacks_is_named(key: str, manifest: BundleManifest, tmp_path: Path) -> None:
    def age(table: dict[str, Any]) -> None:
        to_schema_5(table)
        del table[key]

    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, age))
    with pytest.raises(ArtifactError, match="family" if key == "family" else "tasks"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named(name: str, manifest: BundleManifest, tmp_path: Path) -> None:
    edit, named = DEFECTS[name]
    (tmp_path / MANIFEST_NAME).write_bytes(edited(manifest, edit))
    with pytest.raises(ArtifactError, match=named) as caught:
        read_manifest(tmp_path)
    assert caught.value.hint
    assert ("upgrade" in caught.value.hint) == (name == "newer schema")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_a_path_that_leaves_is_unsafe(path: str, manifest: BundleManifest, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(
        edited(manifest, lambda t: t["files"].update({path: t["files"]["unet/model.onnx"]}))
    )
    with pytest.raises(UnsafeInputError):
        read_manifest(tmp_path)


def test_a_link_on_the_way_is_unsafe(manifest: BundleManifest, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest)
    (tmp_path / "unet").symlink_to("/etc")
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        read_manifest(tmp_path)


def test_every_truncation_is_refused(manifest: BundleManifest, tmp_path: Path) -> None:
    whole = manifest.to_json().rstrip()
    for end in range(0, len(whole), len(whole) // 40):
        (tmp_path / MANIFEST_NAME).write_bytes(whole[:end])
        with pytest.raises(ArtifactError, match="damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"3", b'"x"', b"\xff", b"[" * 100_000, b"{" + b" " * (17 << 20) + b"}"]
)
def test_what_is_no_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path)


def test_a_folder_without_one_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "folder" / MANIFEST_NAME).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "none", tmp_path / "folder"):
        with pytest.raises(ArtifactError, match="not an sdopt bundle") as caught:
            read_manifest(folder)
        assert "sdopt convert" in caught.value.hint


def test_damage_is_one_sentence_for_each_file(tmp_path: Path) -> None:
    for name in ("whole", "changed", "short", "gone", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"content")
    files = {path.name: record_file(path) for path in tmp_path.iterdir()}
    assert find_damage(tmp_path, files) == []
    (tmp_path / "changed").write_bytes(b"Content")
    (tmp_path / "short").write_bytes(b"cont")
    (tmp_path / "gone").unlink()
    os.link(tmp_path / "weights.safetensors", tmp_path / "second")
    damage = sorted(find_damage(tmp_path, files))
    assert len(damage) == 4
    for sentence, name, word in zip(
        damage, ("changed", "gone", "short", "weights.safetensors"), ("SHA-256", "missing", "4 bytes", "hard links"),
        strict=True,
    ):  # fmt: skip
        assert sentence.startswith(name)
        assert word in sentence
    with pytest.raises(ArtifactError, match="gone is missing"):
        require_intact(tmp_path, files)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(BundleManifest.model_json_schema(), indent=1, sort_keys=True) + "\n")
