"""The sampler of a GPU's memory, against a double of NVML."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.machine.device_memory import sample_device_memory


class FakeNvml:
    """`pynvml` on a GPU whose use a test sets: of this process, or of all."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, own: list[Any] | None = None, fails: bool = False) -> None:
        self.used, self._own, self._fails, self.open = 1000, own, fails, 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self._fails:
            raise self.NVMLError
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-abc":
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        if self._own is None:
            raise self.NVMLError
        return self._own


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_the_peak_of_this_process_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = process(os.getpid(), 10)
    nvml = FakeNvml(own=[process(1, 99_999), own])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    with sample_device_memory("abc") as peak:
        own.usedGpuMemory = 700
        while peak.peak_bytes != 700:
            time.sleep(0.001)
        own.usedGpuMemory = 20
    assert peak.peak_bytes == 700
    assert nvml.open == 0


@pytest.mark.parametrize("own", [[], [process(os.getpid(), None)], [process(os.getpid() + 1, 5)]])
def test_a_process_that_nvml_does_not_know_is_what_the_gpu_holds_more(
    own: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(own=own)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    with sample_device_memory("abc") as peak:
        nvml.used = 1600
    assert peak.peak_bytes == 600


@pytest.mark.parametrize(("uuid", "own"), [("abd", []), ("MIG-abc", []), ("GPU-abc", None)])
def test_what_nvml_refuses_to_say_ends_nothing(
    uuid: str, own: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(own=own)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    with sample_device_memory(uuid) as peak:
        pass
    assert peak.peak_bytes is None
    assert nvml.open == 0


def test_without_the_library_or_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(own=[], fails=True))  # type: ignore[arg-type]
    with sample_device_memory("abc") as peak:
        pass
    assert peak.peak_bytes is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with sample_device_memory("abc") as peak:
        pass
    assert peak.peak_bytes is None
