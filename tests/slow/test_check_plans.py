"""`sdopt check` and its neighbours on a bundle of real TensorRT plans, and on all that can be wrong with them.

No test here opens a plan: that there is no GPU is an answer, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdopt
from sdopt.bundle.manifest import read_manifest
from sdopt.bundle.plan_header import find_contradictions
from sdopt.disk.file_records import record_file
from sdopt.disk.files import hash_file
from sdopt.errors import MissingHardware, SdoptError, UnsafeInputError
from sdopt.machine.gpus import find_gpus
from sdopt.preflight.check import check_bundle
from sdopt.preflight.runnable import require_sound
from tests.planted_plans import make_machine
from tests.sdopt_process import run_sdopt

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not there")

without_gpu = pytest.mark.skipif(bool(find_gpus()), reason="there is a GPU")
Edit = Callable[[dict[str, Any]], object]


def run(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_sdopt(*words, cache=cache)


@pytest.fixture
def copy(rtx_bundle: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(rtx_bundle[1], tmp_path / "b")
    return tmp_path / "b"


def unet_plan(folder: Path, generation: str = "sm89") -> Path:
    plans = read_manifest(folder).components["unet"].plans  # type: ignore[index]
    return folder / next(plan.file for plan in plans if plan.generation == generation)


def edit_manifest(folder: Path, edit: Edit) -> None:
    table = json.loads((folder / "bundle.json").read_bytes())
    edit(table)
    (folder / "bundle.json").write_text(json.dumps(table))


def edit_plans(folder: Path, **values: Any) -> None:
    def edit(table: dict[str, Any]) -> None:
        for part in table["components"].values():
            for plan in part["plans"]:
                plan.update(values)

    edit_manifest(folder, edit)


def adapt_digest(folder: Path, path: Path) -> None:
    """What somebody does who exchanges a plan and knows that digests are looked at."""
    record = record_file(path).model_dump()
    name = path.relative_to(folder).as_posix()
    edit_manifest(folder, lambda table: table["files"].update({name: record}))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the file may be one with the store's
    path.write_bytes(data)


def refused(cache: Path, *words: str) -> tuple[int, str, str]:
    """(exit code, message, hint), the same on both outputs."""
    done = run(cache, *words, "--json")
    error = json.loads(done.stdout)["error"]
    assert error["message"] in done.stderr
    assert error["hint"]
    return done.returncode, error["message"], error["hint"]


def test_plans_are_what_their_records_say(rtx_bundle: tuple[Path, Path]) -> None:
    manifest = read_manifest(rtx_bundle[1])
    plans = [plan for part in manifest.components.values() for plan in part.plans]
    assert {plan.generation for plan in plans} == {"sm86", "sm89", "sm120"}
    for plan in plans:
        assert find_contradictions(rtx_bundle[1], plan) == []
    require_sound(rtx_bundle[1], manifest)


@without_gpu
def test_built_here_it_is_whole_and_lacks_a_gpu(rtx_bundle: tuple[Path, Path]) -> None:
    code, message, hint = refused(rtx_bundle[0], "check", str(rtx_bundle[1]))
    assert code == 5
    assert "is whole, and this machine cannot run it: the plans need an NVIDIA GPU" in message
    assert hint.startswith("sdopt convert")
    assert f"-o {rtx_bundle[1]}-cpu" in hint


def test_on_machines_that_have_what_it_needs(rtx_bundle: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(rtx_bundle[0]))
    for generation in ("sm89", "sm120"):
        report = check_bundle(rtx_bundle[1], machine=make_machine(generation))
        assert report.sentence.endswith("is whole, runs on this machine, and fidelity: not verified")
        assert report.plans["unet"] == (unet_plan(rtx_bundle[1], generation).relative_to(rtx_bundle[1]).as_posix(),)  # type: ignore[index]
    other = check_bundle(rtx_bundle[1], machine=make_machine("sm80"))
    assert "there are plans for sm86, sm89 and sm120, and the NVIDIA GeForce RTX 4090 here is sm80" in other.sentence
    assert "--target rtx:sm80,sm86,sm89,sm120" in other.remedy
    newer = check_bundle(rtx_bundle[1], machine=make_machine(version="1.8.0.33"))
    assert "and 1.8.0.33 is installed" in newer.sentence
    assert newer.remedy == "pip install 'tensorrt-rtx==1.7.1.116'"


def test_from_elsewhere_it_is_refused_until_it_is_named(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "cache"
    monkeypatch.setenv("SDOPT_CACHE", str(elsewhere))
    sha256 = hash_file(copy / "bundle.json")
    drawing = ("generate", str(copy), "a star", "-o", str(tmp_path / "o"))
    measuring = ("bench", str(copy), "--against", "", "--repeats", "1")
    for words in (("check", str(copy)), drawing, measuring):
        code, message, hint = refused(elsewhere, *words)
        assert (code, "not built here" in message) == (4, True)
        assert hint.endswith(f"sdopt check {copy} --trust-engine {sha256}")
    with pytest.raises(UnsafeInputError):
        sdopt.load(copy)
    if find_gpus():
        return
    with pytest.raises(MissingHardware):
        sdopt.load(copy, trust_engines=(sha256,))
    assert refused(elsewhere, *drawing, "--trust-engine", sha256)[0] == 5
    assert refused(elsewhere, *drawing)[0] == 4, "generate trusts once"
    told = shlex.split(refused(elsewhere, "check", str(copy))[2].partition(": sdopt ")[2])
    assert refused(elsewhere, *told)[0] == 5
    assert refused(elsewhere, "check", str(copy))[0] == 5, "check trusts from then on"
    assert refused(elsewhere, *drawing)[0] == 5


def test_no_runtime_library_is_imported_for_a_bad_plan(rtx_bundle: tuple[Path, Path], copy: Path) -> None:
    poison = (
        "import sys\n"
        "sys.modules['tensorrt_rtx'] = sys.modules['tensorrt'] = None\n"
        "from sdopt.cli.main import main\n"
        "main()"
    )
    flip_bit(unet_plan(copy))
    for folder, code in ((copy, 1), (rtx_bundle[1], 4)):
        done = subprocess.run(
            [sys.executable, "-c", poison, "check", str(folder)], capture_output=True, text=True, check=False,
            env={**os.environ, "SDOPT_CACHE": str(copy.parent / "none")},
        )  # fmt: skip
        assert done.returncode == code, done.stderr


def exchange(folder: Path) -> None:
    plan = unet_plan(folder)
    plan.unlink()
    shutil.copyfile(unet_plan(folder, "sm120"), plan)
    adapt_digest(folder, plan)


def truncate(folder: Path) -> None:
    plan = unet_plan(folder)
    data = plan.read_bytes()
    plan.unlink()
    plan.write_bytes(data[: len(data) // 3])


def truncate_and_adapt(folder: Path) -> None:
    truncate(folder)
    adapt_digest(folder, unet_plan(folder))


def flip_and_adapt(folder: Path) -> None:
    flip_bit(unet_plan(folder))
    adapt_digest(folder, unet_plan(folder))


def replace_by_text(folder: Path) -> None:
    plan = unet_plan(folder)
    plan.unlink()
    plan.write_bytes(b"#!/bin/sh\nrm -rf /\n".ljust(4096))
    adapt_digest(folder, plan)


BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated": (truncate, 1, "bytes, not"),
    "truncated, digest adapted": (truncate_and_adapt, 1, "its own header says"),
    "one flipped bit": (lambda folder: flip_bit(unet_plan(folder)), 1, "its SHA-256 differs"),
    "one flipped bit, digest adapted": (flip_and_adapt, 4, "not built here"),
    "missing": (lambda folder: unet_plan(folder).unlink(), 1, "is missing"),
    "of another generation than it says": (exchange, 1, "is for sm120, and the manifest says sm89"),
    "of another version than it says": (
        lambda folder: edit_plans(folder, version="1.6.0.54"), 1, "is of tensorrt-rtx 1.7.1.116, and the manifest says"
    ),
    "of another flavour than it says": (
        lambda folder: edit_plans(folder, flavour="tensorrt"), 1, "is a plan of tensorrt-rtx"
    ),
    "no plan at all": (replace_by_text, 1, "does not begin as a plan"),
    "not in the manifest's files": (
        lambda folder: edit_manifest(
            folder, lambda table: table["files"].pop(unet_plan(folder).relative_to(folder).as_posix())
        ), 1, "has no digest of",
    ),
    "outside the bundle": (lambda folder: edit_plans(folder, file="../../etc/passwd"), 1, "has no digest of"),
    "of another system": (lambda folder: edit_plans(folder, system="Windows AMD64"), 5, "built for Windows AMD64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plan_is_refused_with_a_sentence_and_a_command(
    name: str, rtx_bundle: tuple[Path, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, exit_code, said = BAD[name]
    spoil(copy)
    code, message, hint = refused(rtx_bundle[0], "check", str(copy))
    assert (code, said in message) == (exit_code, True), message
    assert "sdopt convert" in hint or "sdopt check" in hint
    monkeypatch.setenv("SDOPT_CACHE", str(rtx_bundle[0]))
    with pytest.raises(SdoptError) as caught:
        sdopt.load(copy)
    assert (caught.value.exit_code, said in caught.value.message) == (exit_code, True), caught.value


def test_inspect_tells_of_plans(rtx_bundle: tuple[Path, Path]) -> None:
    plan = unet_plan(rtx_bundle[1])
    table = json.loads(run(rtx_bundle[0], "inspect", str(plan), "--json").stdout)
    assert (table["kind"], table["generation"], table["version"]) == ("plan", "sm89", "1.7.1.116")
    assert table["sha256"] == hash_file(plan)
    told = " ".join(run(rtx_bundle[0], "inspect", str(rtx_bundle[1])).stderr.split())
    assert "tensorrt-rtx 1.7.1.116 for sm89 on Linux x86_64; attention 14 of 14 native, 8 of 14 fused" in told


def test_doctor_says_what_can_be_built_for(rtx_bundle: tuple[Path, Path]) -> None:
    table = json.loads(run(rtx_bundle[0], "doctor", "--json").stdout)
    assert {"sm86", "sm89", "sm120", "ampere+"} <= set(table["builds_for"]["tensorrt-rtx"])
    assert len(table["gpus"]) == len(find_gpus())
