"""What every tier shares: the checkpoint that ships with the package, and one bundle of it for the whole run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sdopt

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_SHAPES = Path(sdopt.__file__).resolve().parent / "assets" / "tiny-shapes"

# Seconds after which a test hangs, by tier: a child that never answers must not hold up a run. Far above
# what any of them takes on two busy cores.
_LIMITS_S = {"unit": 600, "contract": 600, "slow": 2400, "gpu": 600}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(REPOSITORY / "tests").parts[0]
        item.add_marker(pytest.mark.timeout(_LIMITS_S[tier]))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pristine_bundle(shared_folder: Path) -> Path:
    """tiny-shapes in fp32, without a verdict, built once by whichever worker comes first. Not to be written to."""
    output = shared_folder / "tiny"
    command = [sys.executable, "-m", "sdopt", "convert", str(TINY_SHAPES), "-o", str(output)]
    with (shared_folder / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            subprocess.run(
                [*command, "--precision", "fp32", "--no-verify"],
                env={**os.environ, "SDOPT_CACHE": str(shared_folder / "cache")}, check=True, capture_output=True,
            )  # fmt: skip
    return output


@pytest.fixture(scope="session")
def rtx_bundle(shared_folder: Path) -> tuple[Path, Path]:
    """The cache and the bundle of tiny-shapes with real TensorRT-RTX plans for three GPU generations, not verified.

    Built once by whichever worker comes first. Neither is to be written to.
    """
    cache, output = shared_folder / "rtx-cache", shared_folder / "rtx"
    command = [sys.executable, "-m", "sdopt", "convert", str(TINY_SHAPES), "-o", str(output)]
    with (shared_folder / "rtx.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            subprocess.run(
                [*command, "--target", "rtx:sm86,sm89,sm120", "--no-verify"],
                env={**os.environ, "SDOPT_CACHE": str(cache)}, check=True, capture_output=True,
            )  # fmt: skip
    return cache, output


@pytest.fixture
def bundle(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    folder = tmp_path / "bundle"
    shutil.copytree(pristine_bundle, folder)
    return folder
