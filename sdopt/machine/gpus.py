"""NVIDIA GPUs as the driver's own management library (NVML) shows them: no CUDA context, no runtime library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sdopt.machine.machine_record import GpuRecord


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one slice of it under MIG. Bytes are 0 where the driver does not say, as with unified memory."""

    record: GpuRecord
    free_bytes: int
    uuid: str = ""
    """As NVML writes it: `GPU-…`, or `MIG-…` for a slice."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def generation(self) -> str:
        """The compute capability, as in `sm89`."""
        return self.record.generation


def find_gpus(nvml: Any = None, visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs that a process started now would see, in NVML's order; empty without a driver.

    `nvml` is the module `pynvml`, and `visible` is $CUDA_VISIBLE_DEVICES, which are looked up where they are None.
    CUDA numbers by speed where $CUDA_DEVICE_ORDER is not PCI_BUS_ID: with GPUs of different kinds, a number may mean
    another one there.
    """
    nvml = _import_nvml() if nvml is None else nvml
    if nvml is None:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        return tuple(_describe(nvml, device) for device in _pick(list(_list_devices(nvml)), visible))
    except nvml.NVMLError:  # a driver that fails in the middle of an answer is as good as none
        return ()
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


@dataclass(frozen=True)
class _Device:
    index: int
    uuid: str
    handle: Any
    parent: Any
    """The whole GPU where the handle is a slice of it, else the handle."""


def _list_devices(nvml: Any) -> Iterator[_Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        # CUDA shows the slices of a GPU in their parent's place.
        for handle in list(_list_slices(nvml, gpu)) or [gpu]:
            yield _Device(index, nvml.nvmlDeviceGetUUID(handle), handle, gpu)


def _list_slices(nvml: Any, gpu: Any) -> Iterator[Any]:
    try:
        sliced = bool(nvml.nvmlDeviceGetMigMode(gpu)[0])
    except nvml.NVMLError:
        return
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if sliced else 0):
        with suppress(nvml.NVMLError):
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)


def _pick(devices: list[_Device], visible: str | None) -> list[_Device]:
    """The devices that $CUDA_VISIBLE_DEVICES names: numbers or beginnings of UUIDs, up to the first that is neither."""
    if visible is None:
        return devices
    picked: list[_Device] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdecimal():
            found = [device for device in devices if device.index == int(word)]
        else:
            found = [device for device in devices if word and device.uuid.startswith(word)]
        if not found:
            break
        picked.append(found[0])
    return picked


def _describe(nvml: Any, device: _Device) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device.parent)
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    total_bytes = free_bytes = 0
    with suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(device.handle)
        total_bytes, free_bytes = int(memory.total), int(memory.free)
    record = GpuRecord(
        name=nvml.nvmlDeviceGetName(device.parent), generation=f"sm{major}{minor}", memory_bytes=total_bytes,
        driver=nvml.nvmlSystemGetDriverVersion(), cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )  # fmt: skip
    return Gpu(record, free_bytes, device.uuid)
