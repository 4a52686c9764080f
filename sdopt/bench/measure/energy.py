"""Energy that was used while something ran: by the processor as RAPL counts it, or by the GPU as NVML does.

RAPL counts processor packages, with all that runs on them and without the memory; NVML counts the whole GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sdopt.machine.device_memory import find_handle, open_nvml

_RAPL_FOLDER = Path("/sys/class/powercap")


class Meter(Protocol):
    """Joules between two readings of a counter."""

    @property
    def name(self) -> str:
        """As `ProcessRecord.energy_source` has it."""
        ...

    def start(self) -> None: ...

    def read_j(self) -> float | None:
        """Since `start`; None where the system does not say."""
        ...


class RaplMeter:
    """Every package of the machine, in microjoules. A counter starts again from 0 at `max_energy_range_uj`."""

    name = "rapl"

    def __init__(self, folder: Path = _RAPL_FOLDER) -> None:
        self._folder, self._before = folder, dict[Path, int]()

    def start(self) -> None:
        self._before = self._read() or {}

    def read_j(self) -> float | None:
        """More than one return to 0 cannot be seen: at 200 W that takes a counter 20 minutes."""
        after = self._read()
        if not self._before or after is None or after.keys() != self._before.keys():
            return None
        return sum(self._measure(zone, after) for zone in after) / 1e6

    def _measure(self, zone: Path, after: Mapping[Path, int]) -> int:
        used_uj = after[zone] - self._before[zone]
        return used_uj if used_uj >= 0 else used_uj + int((zone / "max_energy_range_uj").read_text(encoding="ascii"))

    def _read(self) -> dict[Path, int] | None:
        """By package; None where one cannot be read: since 2020, Linux keeps the counters for root."""
        try:
            zones = [
                zone for zone in sorted(self._folder.glob("intel-rapl:*"))
                if (zone / "name").read_text(encoding="ascii").startswith("package")
            ]  # fmt: skip
            return {zone: int((zone / "energy_uj").read_text(encoding="ascii")) for zone in zones}
        except (OSError, ValueError):
            return None


class NvmlMeter:
    """The GPU's own count since its driver was loaded, in millijoules."""

    name = "nvml"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._before: int | None = None

    def start(self) -> None:
        self._before = self._read()

    def read_j(self) -> float | None:
        after = self._read()
        return None if after is None or self._before is None else (after - self._before) / 1e3

    def _read(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:  # older than Volta, or a slice of a GPU
            return None


@contextmanager
def open_meter(gpu_uuid: str | None) -> Iterator[Meter | None]:
    """The meter of what computes: of the GPU with this UUID, else of the processor. None for a GPU without NVML."""
    if gpu_uuid is None:
        yield RaplMeter()
        return
    with open_nvml() as nvml:
        handle = None if nvml is None else find_handle(nvml, gpu_uuid)
        yield None if handle is None else NvmlMeter(nvml, handle)
