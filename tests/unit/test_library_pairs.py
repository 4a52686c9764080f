"""Packages that do not fit each other are named as a pair, with the command that mends them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sdopt.machine.library_pairs import explain_failure, find_mismatches

RIDDLE = "Could not import module 'BloomPreTrainedModel'. Are this object's requirements defined correctly?"


def installed(**versions: str) -> Callable[[str], str]:
    def find(package: str) -> str:
        try:
            return versions[package.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(package) from None

    return find


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.27.0"}, ("torchvision 0.27.0", "torch 2.13.0+cpu", "0.28")),
        ({"torch": "2.13.0", "torchaudio": "2.11.0"}, ("torchaudio 2.11.0", "torch 2.13.0", "2.13")),
        ({"onnxruntime": "1.31.1", "onnxruntime_gpu": "1.30.0"}, ("onnxruntime 1.31.1", "onnxruntime-gpu 1.30.0")),
    ],
)
def test_a_pair_that_does_not_fit_is_named_with_both_versions(versions: dict[str, str], words: tuple[str, ...]) -> None:
    (mismatch,) = find_mismatches(installed(**versions))
    assert [word for word in words if word not in mismatch.sentence + mismatch.command] == []
    assert "pip " in mismatch.command


@pytest.mark.parametrize(
    "versions",
    [
        {}, {"torch": "2.13.0"}, {"torchvision": "0.28.0"}, {"torch": "2.13.0", "torchvision": "0.28.1"},
        {"torch": "2.9.1", "torchvision": "0.24.1"}, {"torch": "2.14.1", "torchvision": "0.29.1"},
        {"torch": "nightly", "torchvision": "x"}, {"onnxruntime": "1.31.1"},
    ],
)  # fmt: skip
def test_pairs_that_fit_or_are_not_there_are_no_mismatch(versions: dict[str, str]) -> None:
    assert find_mismatches(installed(**versions)) == []


def test_the_riddle_of_transformers_is_explained_by_the_pair_and_other_failures_are_not() -> None:
    find = installed(torch="2.13.0", torchvision="0.20.0")
    mismatch = explain_failure(RIDDLE, find)
    assert mismatch is not None
    assert "torchvision 0.20.0" in mismatch.sentence
    assert explain_failure("the disk is full", find) is None
    assert explain_failure(RIDDLE, installed(torch="2.13.0")) is None


def test_doctor_lives_with_libraries_that_break_when_they_are_imported(tmp_path: Path) -> None:
    """A real run: a torchvision of another torch, an openvino that aborts, an onnxruntime that raises."""
    for name, code in {
        "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "openvino": "import os; os.abort()",
        "onnxruntime": "raise OSError('libcudart.so.13: cannot open shared object file')",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    metadata = tmp_path / "torchvision-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "sdopt", "doctor"], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "torchvision 0.1.0 does not fit torch" in done.stderr
    assert "pip uninstall -y torchvision" in done.stderr
    assert "cannot be imported" in " ".join(done.stderr.split())
    lines = done.stderr.splitlines()
    remedy = lines[lines.index("openvino:") + 1]
    assert "torchvision" not in remedy, "another library's remedy"
    assert "openvino" in remedy
    assert "SIGABRT" in " ".join(done.stderr.replace("│", " ").split())
    assert "libcudart.so.13" in " ".join(done.stderr.split())
    assert max(len(line) for line in done.stderr.splitlines() if "│" in line) <= 80
    assert "--target cpu takes onnxruntime" in done.stderr
