"""Unit tests keep what sdopt derives from checkpoints out of the user's own cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("SDOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
