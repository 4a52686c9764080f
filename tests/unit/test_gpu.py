"""GPUs as NVML tells of them, from an NVML that is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.machine.environment import describe_machine, find_machine
from sdopt.machine.gpus import find_gpus


class NVMLError(Exception):
    pass


@dataclass
class Card:
    name: str
    capability: tuple[int, int]
    uuid: str
    total: int = 24 << 30
    free: int = 20 << 30
    slices: list[Card] = field(default_factory=list)


class FakeNvml:
    """The part of `pynvml` that is used, over `cards`; `broken` are the names of functions that fail."""

    NVMLError = NVMLError

    def __init__(self, *cards: Card, broken: tuple[str, ...] = ()) -> None:
        self._cards, self._broken, self.open = cards, broken, 0

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "_broken") if not name.startswith("_") else False:
            raise NVMLError(name)
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        return self._cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        return card.name

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:  # noqa: N802
        return card.capability

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:  # noqa: N802
        return SimpleNamespace(total=card.total, free=card.free)

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:  # noqa: N802
        return [int(bool(card.slices)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:  # noqa: N802
        if index >= len(card.slices):
            raise NVMLError("not there")
        return card.slices[index]

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 13010


ADA = Card("NVIDIA GeForce RTX 4090", (8, 9), "GPU-aaaa")
BLACKWELL = Card("NVIDIA GeForce RTX 5090", (12, 0), "GPU-bbbb", total=32 << 30)


def test_a_gpu_is_described() -> None:
    nvml = FakeNvml(ADA)
    (gpu,) = find_gpus(nvml, "0")
    assert (gpu.name, gpu.generation, gpu.free_bytes) == ("NVIDIA GeForce RTX 4090", "sm89", 20 << 30)
    assert gpu.uuid == "GPU-aaaa"
    assert (gpu.record.memory_bytes, gpu.record.driver, gpu.record.cuda) == (24 << 30, "580.65.06", "13.1")
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("0,1", ["sm89", "sm120"]), ("1", ["sm120"]), ("1,0", ["sm120", "sm89"]), ("", []), ("-1", []),
     ("1,-1,0", ["sm120"]), ("7", []), ("GPU-bb", ["sm120"]), ("GPU-cc", []), (" 1 ", ["sm120"]), ("none", [])],
)  # fmt: skip
def test_what_the_environment_hides_is_not_seen(visible: str, seen: list[str]) -> None:
    assert [gpu.generation for gpu in find_gpus(FakeNvml(ADA, BLACKWELL), visible)] == seen


def test_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.generation for gpu in find_gpus(FakeNvml(ADA, BLACKWELL))] == ["sm120"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(find_gpus(FakeNvml(ADA, BLACKWELL))) == 2


def test_slices_stand_for_their_gpu() -> None:
    part = Card("a slice", (0, 0), "MIG-1", total=5 << 30, free=4 << 30)
    whole = Card("NVIDIA A100", (8, 0), "GPU-cccc", total=40 << 30, slices=[part])
    for visible in ("0", "MIG-1"):
        (gpu,) = find_gpus(FakeNvml(whole, ADA), visible)
        assert (gpu.name, gpu.generation, gpu.record.memory_bytes) == ("NVIDIA A100", "sm80", 5 << 30)
        assert gpu.uuid == "MIG-1"


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlSystemGetDriverVersion"])
def test_a_driver_that_does_not_answer_is_none(broken: str) -> None:
    assert find_gpus(FakeNvml(ADA, broken=(broken,)), "0") == ()


def test_memory_that_the_driver_does_not_tell_is_not_known() -> None:
    (gpu,) = find_gpus(FakeNvml(ADA, broken=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode")), "0")
    assert (gpu.record.memory_bytes, gpu.free_bytes) == (0, 0)


def test_the_machine_is_found_as_it_is_recorded() -> None:
    machine = find_machine()
    assert machine.system == describe_machine().system
    assert tuple(gpu.record for gpu in machine.gpus) == describe_machine().gpus
