"""What every tier shares: the checkpoint that ships with the package, and one bundle of it for the whole run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import sdopt
from sdopt.disk.locks import locked
from tests.sdopt_process import run_sdopt

# As the command sets it before its libraries are imported: the zygote of a test process then has it as well.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_SHAPES = Path(sdopt.__file__).resolve().parent / "assets" / "tiny-shapes"
TINY_ADAPTERS = TINY_SHAPES.with_name("tiny-adapters")

# A test that hangs fails after this, instead of holding CI until its job is ended. Fixtures are not counted: whichever
# test comes first pays for a bundle that all share, and they limit their own processes.
TIME_LIMITS_S = {"unit": 300, "contract": 300, "slow": 1800, "gpu": 600}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test its tier's time limit; one that has a `timeout` mark keeps its own."""
    for item in items:
        tier = item.path.relative_to(REPOSITORY / "tests").parts[0]
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMITS_S[tier], func_only=True))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def build_once(output: Path, cache: Path, *options: str) -> Path:
    """tiny-shapes in the folder `output`, without a verdict, built by whichever worker comes first.

    Not to be written to. `cache` is the store that the build fills.
    """
    with locked(output.with_name(f"{output.name}.lock")):
        if not output.exists():
            done = run_sdopt("convert", str(TINY_SHAPES), "-o", str(output), "--no-verify", *options, cache=cache)
            assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def pristine_bundle(shared_folder: Path) -> Path:
    """tiny-shapes in fp32, without a verdict, built once for all workers. Not to be written to."""
    return build_once(shared_folder / "tiny", shared_folder / "cache", "--precision", "fp32")


@pytest.fixture(scope="session")
def rtx_bundle(shared_folder: Path) -> tuple[Path, Path]:
    """The cache and the bundle of tiny-shapes with real TensorRT-RTX plans for three GPU generations, not verified.

    Built once for all workers. Neither is to be written to.
    """
    cache = shared_folder / "rtx-cache"
    return cache, build_once(shared_folder / "rtx", cache, "--target", "rtx:sm86,sm89,sm120")


@pytest.fixture
def bundle(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    folder = tmp_path / "bundle"
    shutil.copytree(pristine_bundle, folder)
    return folder
