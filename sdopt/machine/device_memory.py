"""How much memory of a GPU this process holds at its peak, as the driver says through NVML."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SAMPLE_S = 0.02


class DeviceMemoryPeak:
    """`peak_bytes` is the most device memory that this process was seen to hold; None where NVML cannot say.

    That is all of it: weights, scratch memory, torch's cache, CUDA's context and kernels, which torch's own count
    leaves out. In a container NVML may not know the process by its number: then it is what the whole GPU holds more
    than at the start, and another program on the GPU counts too.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None

    def see(self, used_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes or 0, used_bytes)


@contextmanager
def sample_device_memory(uuid: str) -> Iterator[DeviceMemoryPeak]:
    """Watch a GPU from a thread, every 20 ms, while the body runs. NVML's UUIDs begin with `GPU-`, and torch's do not.

    Where NVML fails, the body runs on, and less is known.
    """
    peak = DeviceMemoryPeak()
    with open_nvml() as nvml:
        started = None if nvml is None else _start(nvml, uuid)
        if started is None:
            yield peak
            return
        handle, before_bytes = started
        done = threading.Event()

        def watch() -> None:
            while True:
                last = done.is_set()
                with suppress(nvml.NVMLError):
                    peak.see(_used_bytes(nvml, handle, before_bytes))
                if last:
                    return
                done.wait(_SAMPLE_S)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            done.set()
            thread.join()


def _start(nvml: Any, uuid: str) -> tuple[Any, int] | None:
    """The GPU's handle, and what all programs hold of it; None for a GPU that NVML does not show."""
    handle = find_handle(nvml, uuid)
    try:
        return None if handle is None else (handle, int(nvml.nvmlDeviceGetMemoryInfo(handle).used))
    except nvml.NVMLError:
        return None


def find_handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of a GPU; None for one that it does not show."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except nvml.NVMLError:
        return None


def _used_bytes(nvml: Any, handle: Any, before_bytes: int) -> int:
    own = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    if own and own[0] is not None:
        return int(own[0])
    return max(0, int(nvml.nvmlDeviceGetMemoryInfo(handle).used) - before_bytes)


@contextmanager
def open_nvml() -> Iterator[Any]:
    """The module, initialised; None where it is not installed or no driver answers."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield None
        return
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
