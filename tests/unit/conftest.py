"""Unit tests keep what sdopt derives from checkpoints out of the user's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.model.family import Family
from tests.checkpoints import make_model, small_recipe, write_folder


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("SDOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """Folders of small models with seeded random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write_folder(folder / family, make_model(small_recipe(family))) for family in (Family.SD1, Family.SDXL)
    }
