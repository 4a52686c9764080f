"""Plans from elsewhere are refused until their digest is named; those of this user's own builds are not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.trust import list_untrusted, parse_digest, remember_built, remember_named
from sdopt.disk.files import hash_file
from sdopt.errors import ArtifactError, UnsafeInputError, UsageError
from sdopt.pipeline.load import load_pipeline
from sdopt.preflight.runnable import require_sound, require_trusted
from tests.planted_plans import make_plan, make_plan_file, write_plan_bundle

FILES = {"unet/sm89.plan": make_plan_file(), "unet/sm86.plan": make_plan_file(bits=0x04)}


def digest_of_file(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "b"


@pytest.fixture
def manifest(folder: Path) -> BundleManifest:
    return write_plan_bundle(folder, FILES, [make_plan("sm89"), make_plan("sm86")])


def test_plans_from_elsewhere_are_refused_with_the_command(folder: Path, manifest: BundleManifest) -> None:
    with pytest.raises(UnsafeInputError, match="2 engines that were not built here") as caught:
        require_trusted(folder, manifest)
    sha256 = hash_file(folder / "bundle.json")
    assert caught.value.hint.endswith(f": sdopt check {folder} --trust-engine {sha256}")
    assert caught.value.exit_code == 4
    require_trusted(folder, manifest, [sha256])
    with pytest.raises(UnsafeInputError):
        require_trusted(folder, manifest)  # named once is not remembered


def test_what_was_built_here_is_trusted(folder: Path, manifest: BundleManifest) -> None:
    remember_built(digest_of_file("unet/sm89.plan"))
    assert list_untrusted(folder, manifest) == ("unet/sm86.plan",)
    with pytest.raises(UnsafeInputError, match="an engine that was not built here"):
        require_trusted(folder, manifest)
    require_trusted(folder, manifest, [digest_of_file("unet/sm86.plan").upper()])
    remember_built(digest_of_file("unet/sm86.plan"))
    require_trusted(folder, manifest)


def test_another_digest_than_the_bundles_is_no_reason_to_name_the_right_one(
    folder: Path, manifest: BundleManifest
) -> None:
    """Who names a digest has it from whoever made the bundle: another one means another bundle."""
    with pytest.raises(UnsafeInputError, match="does not name") as caught:
        require_trusted(folder, manifest, ["ab" * 32])
    assert hash_file(folder / "bundle.json") not in str(caught.value)


def test_a_bundles_digest_is_remembered_as_its_plans(folder: Path, manifest: BundleManifest) -> None:
    remember_named(folder, manifest, [hash_file(folder / "bundle.json")])
    assert list_untrusted(folder, manifest) == ()
    remember_named(folder, manifest, [])


def test_one_plan_may_be_remembered(folder: Path, manifest: BundleManifest) -> None:
    remember_named(folder, manifest, [digest_of_file("unet/sm86.plan")])
    assert list_untrusted(folder, manifest) == ("unet/sm89.plan",)


def test_a_changed_manifest_is_another(folder: Path, manifest: BundleManifest) -> None:
    sha256 = hash_file(folder / "bundle.json")
    changed = manifest.model_copy(update={"name": "other"})
    (folder / "bundle.json").write_bytes(changed.to_json())
    with pytest.raises(UnsafeInputError):
        require_trusted(folder, changed, [sha256])


@pytest.mark.parametrize("word", ["", "sm89", "ab" * 31, "g" * 64, "ab" * 32 + "\n1"])
def test_what_is_no_digest_is_a_usage_error(word: str) -> None:
    with pytest.raises(UsageError, match="not a SHA-256"):
        parse_digest(word)


def test_entries_that_this_user_did_not_write_do_not_count(
    folder: Path, manifest: BundleManifest, own_cache: Path, tmp_path: Path
) -> None:
    sha256 = digest_of_file("unet/sm89.plan")
    remember_built(sha256)
    entry = own_cache / "trusted-engines" / sha256
    assert entry.parent.stat().st_mode & 0o077 == 0
    assert "unet/sm89.plan" not in list_untrusted(folder, manifest)

    entry.write_text("something else")
    assert "unet/sm89.plan" in list_untrusted(folder, manifest)
    entry.unlink()
    (tmp_path / "real").write_text(sha256)
    entry.symlink_to(tmp_path / "real")
    assert "unet/sm89.plan" in list_untrusted(folder, manifest)
    entry.unlink()
    entry.write_text(sha256)
    assert "unet/sm89.plan" not in list_untrusted(folder, manifest)
    if os.getuid() == 0:
        os.chown(entry, 12345, -1)
        assert "unet/sm89.plan" in list_untrusted(folder, manifest)


def test_a_plan_without_a_digest_is_never_trusted(folder: Path, manifest: BundleManifest) -> None:
    bare = manifest.model_copy(update={"files": {}})
    assert len(list_untrusted(folder, bare)) == 2


def test_every_byte_of_a_plan_is_hashed_before_a_load(folder: Path, manifest: BundleManifest) -> None:
    path = folder / "unet/sm89.plan"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"unet/sm89.plan was changed"):
        require_sound(folder, manifest)
    with pytest.raises(ArtifactError, match=r"unet/sm89.plan was changed"):
        load_pipeline(folder, trust_engines=[hash_file(folder / "bundle.json")])


def test_plans_may_have_several_hard_links(folder: Path, manifest: BundleManifest, tmp_path: Path) -> None:
    """The store and the bundles share them, unlike weight files, which ONNX runtimes then refuse."""
    os.link(folder / "unet/sm89.plan", tmp_path / "second")
    with pytest.raises(ArtifactError, match="names no graph"):  # what else the bundle of a test lacks
        require_sound(folder, manifest)
