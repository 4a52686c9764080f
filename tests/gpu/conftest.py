"""Every test of this tier needs an NVIDIA GPU, and says so where there is none."""

from __future__ import annotations

import pytest

from sdopt.backends.cuda import GpuIdentity, find_gpu


@pytest.fixture(scope="session")
def gpu() -> GpuIdentity:
    found = find_gpu()
    if found is None:
        pytest.skip("no NVIDIA GPU")
    return found


@pytest.fixture(scope="session", autouse=True)
def _needs_gpu(gpu: GpuIdentity) -> None:
    """Before any bundle is built."""
