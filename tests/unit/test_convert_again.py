"""`sdopt convert --again`: the hint of a damaged bundle is typed as it is shown, and the recipe comes back whole."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.again import again_command
from sdopt.bundle.manifest import BundleManifest, write_manifest
from sdopt.cli.convert import convert as command
from sdopt.cli.convert import merge_recipe
from sdopt.convert.finished import _is_whole, vouch_for
from sdopt.disk.file_records import record_file
from sdopt.disk.files import hash_file
from sdopt.disk.store import Store
from sdopt.errors import ArtifactError, CheckpointError, EnvironmentMissingError, RecipeError
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe, Dialect, VerifySettings
from sdopt.model.target import Runtime, Target, parse_target
from sdopt.preflight.check import check_bundle
from sdopt.preflight.plan_choice import choose_plans
from sdopt.preflight.runnable import require_sound
from tests.planted_plans import make_machine, make_plan, with_plans
from tests.reference_session import make_bundle

RECIPES: dict[str, dict[str, Any]] = {
    "prediction": {"prediction": Prediction.V_PREDICTION, "ema": True},
    "int8 weights": {"quantization": "int8-weights", "precision": Precision.INT8, "require_quantized": True},
    "dynamic sizes": {"dynamic": True, "size": "64x96", "batch": 3, "tokens": 231},
    "several sizes": {"size": "64x64..96x96,128x64"},
    "dialect": {"dialect": Dialect.DECOMPOSED},
    "component precision": {"component_precision": {ComponentName.VAE_DECODER: Precision.FP32}, "precision": "bf16"},
    "verify": {
        "verify": VerifySettings(prompts=("a, b", "c\nd"), steps=3, seed=7, guidance_scale=2.5, min_ssim=0.5,
                                 max_psnr_loss=3.0, fidelity=False),
    },
    "not verified": {"verify": VerifySettings(enabled=False)},
    "plans": {"target": "rtx:sm86,sm120", "require_fused": True, "max_memory": "4GiB"},
}  # fmt: skip


def typed(hint: str) -> tuple[BuildRecipe, Path]:
    """The recipe and the output of a hint, read as the command line reads it."""
    words = shlex.split(hint[hint.index("sdopt convert") :])
    assert words[:2] == ["sdopt", "convert"]
    flags = dict(command.make_context("convert", words[2:]).params)
    again, no_verify = flags.pop("again"), flags.pop("no_verify")
    output = flags.pop("output") or again
    for name in ("recipe_file", "save_recipe", "dry_run", "as_json"):
        flags.pop(name)
    return merge_recipe(None, flags, no_verify=no_verify, again=again), output


def plant(folder: Path, **recipe: Any) -> BundleManifest:
    manifest = make_bundle(folder).manifest
    values = {"source": "someone/model", **recipe}
    manifest = manifest.model_copy(update={"recipe": BuildRecipe.model_validate(values)})
    write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize("name", RECIPES)
def test_the_hint_of_a_damaged_bundle_gives_every_field_of_the_recipe(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "my bundle"
    manifest = plant(folder, **RECIPES[name])
    (folder / "extra.txt").write_text("x", encoding="utf-8")
    broken = manifest.model_copy(update={"files": {"extra.txt": record_file(folder / "extra.txt")}})
    write_manifest(folder, broken)
    (folder / "extra.txt").write_text("y", encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        require_sound(folder, broken)
    for hint in (check_bundle(folder).remedy, caught.value.hint):
        recipe, output = typed(hint)
        assert output == folder
        assert recipe.model_dump() == manifest.recipe.model_dump()


@pytest.mark.parametrize("name", RECIPES)
def test_the_hint_where_a_gpu_is_missing_changes_the_target_and_the_precision_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    manifest = with_plans(plant(folder, **RECIPES[name]), {ComponentName.UNET: [make_plan()]})
    with pytest.raises(EnvironmentMissingError) as caught:
        choose_plans(folder, manifest, make_machine(None))
    recipe, output = typed(caught.value.hint)
    assert output == tmp_path / "b-cpu"
    assert (recipe.target, recipe.precision) == (Target(Runtime.CPU), Precision.AUTO)
    assert not recipe.quantization_file, "a CPU may have no arithmetic for what a GPU was quantised for"
    changed = {"target", "precision", "component_precision", "quantization", "require_quantized"}
    assert recipe.model_dump(exclude=changed) == manifest.recipe.model_dump(exclude=changed)


def test_flags_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    manifest = plant(tmp_path / "b", quantization="int8-weights", size="64x64", verify={"steps": 3})
    hint = again_command(tmp_path / "b", output=tmp_path / "c", target=parse_target("rtx:sm89"))
    recipe, output = typed(f"{hint} --batch 2 --min-ssim 0.5")
    assert output == tmp_path / "c"
    expected = manifest.recipe.model_copy(
        update={"target": parse_target("rtx:sm89"), "batch": 2, "verify": VerifySettings(steps=3, min_ssim=0.5)}
    )
    assert recipe == expected
    assert not typed(f"{again_command(tmp_path / 'b')} --no-verify")[0].verify.enabled


@pytest.mark.parametrize(("key", "flag"), [("source", "MODEL --again"), ("vae", "--vae VAE --again")])
def test_a_source_that_is_gone_is_named_with_what_to_give(key: str, flag: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    plant(tmp_path / "b", **{key: str(gone)})
    hint = again_command(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors.* no longer there") as caught:
        typed(hint)
    assert f"sdopt convert {flag} {tmp_path / 'b'}" in caught.value.hint
    given = caught.value.hint.replace("MODEL", "here/model").replace("VAE ", "here/model ", 1)
    assert getattr(typed(given)[0], key) == "here/model"
    gone.touch()
    assert getattr(typed(hint)[0], key) == str(gone)


def test_again_refuses_a_second_recipe_and_what_is_not_a_bundle(tmp_path: Path) -> None:
    plant(tmp_path / "b")
    with pytest.raises(RecipeError, match="--again and --recipe"):
        merge_recipe(tmp_path / "r.toml", {}, no_verify=False, again=tmp_path / "b")
    with pytest.raises(ArtifactError):
        merge_recipe(None, {}, no_verify=False, again=tmp_path)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Store]:
    """A folder with one file that counts as large, and an empty store."""
    monkeypatch.setattr("sdopt.convert.finished._SMALL_FILE_BYTES", 10)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "w.bin").write_bytes(b"0123456789abcdef")
    return tmp_path / "b", Store(tmp_path / "store")


def test_a_large_file_is_read_once_and_again_when_it_was_written_to(
    large: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = large
    read: list[str] = []

    def count(path: Path) -> str:
        read.append(path.name)
        return hash_file(path)

    files = {"w.bin": record_file(folder / "w.bin")}
    monkeypatch.setattr("sdopt.disk.file_records.hash_file", count)
    assert _is_whole(folder, files, store, read_all=False)
    assert _is_whole(folder, files, store, read_all=False)
    assert read == ["w.bin"]
    times = (folder / "w.bin").stat()
    (folder / "w.bin").write_bytes(b"0123456789abcdeF")
    os.utime(folder / "w.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not _is_whole(folder, files, store, read_all=False), "an edit that puts the file's time back is seen"


def test_mending_reads_every_byte_though_a_file_is_vouched_for(large: tuple[Path, Store]) -> None:
    folder, store = large
    files = {"w.bin": record_file(folder / "w.bin")}
    (folder / "w.bin").write_bytes(b"0123456789abcdeF")
    vouch_for(folder, files, store)  # as after a bit that rotted on the disk: no time shows it
    assert _is_whole(folder, files, store, read_all=False)
    assert not _is_whole(folder, files, store, read_all=True)
