"""A stand-in for `pynvml` on a machine with one GPU, GPU-abc, whose clock, brakes and energy a test sets."""

from __future__ import annotations


class FakeNvml:
    NVML_CLOCK_SM = 1
    nvmlClocksEventReasonSwPowerCap = 0x4  # noqa: N815
    nvmlClocksEventReasonSwThermalSlowdown = 0x20  # noqa: N815
    nvmlClocksEventReasonHwThermalSlowdown = 0x40  # noqa: N815
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self, *, mhz: float = 1980, reasons: int = 0, used_mj: int | None = 7_000_000) -> None:
        """`used_mj` is None for a GPU that does not count its energy."""
        self.mhz, self.reasons, self.used_mj = mhz, reasons, used_mj

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-abc":
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> float:  # noqa: N802
        return self.mhz

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self.used_mj is None:
            raise self.NVMLError
        return self.used_mj
