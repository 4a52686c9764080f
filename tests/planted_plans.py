"""Plans and machines that exist on paper only: records for the manifest, headers as TensorRT writes them, GPUs."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdopt.bundle.manifest import BundleManifest, write_manifest
from sdopt.bundle.records import PlanAudit, PlanRecord
from sdopt.disk.digest import FileRecord
from sdopt.machine.environment import InstalledLibrary, Machine
from sdopt.machine.gpus import Gpu
from sdopt.machine.machine_record import GpuRecord
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.component import ComponentName
from tests.reference_session import make_bundle

LINUX = "Linux x86_64"
VERSION = "1.7.1.116"


def make_plan(generation: str = "sm89", component: str = "unet", **changes: Any) -> PlanRecord:
    audit = PlanAudit(
        attention_layers=1, attention_native=1, attention_fused=True, compute_layers={"CONVOLUTION HALF": 1},
        other_precision=(), plan_bytes=int(changes.pop("plan_bytes", 1000)), weights_bytes=900, zero_share=0.1,
        weights_zero_share=0.1, weights_sampled=1, weights_found=1,
    )  # fmt: skip
    values: dict[str, Any] = {
        "file": f"{component}/{generation}.plan", "flavour": "tensorrt-rtx", "version": VERSION,
        "generation": generation, "system": LINUX, "profile": 0, "rung": "side by side", "build_s": 1.0,
        "build_peak_bytes": 1, "audit": audit,
    }  # fmt: skip
    return PlanRecord(**{**values, **changes})


def make_header(
    *, version: str = VERSION, bits: int = 0x08, size_bytes: int = 4096, magic: bytes = b"vtrt", layout: int = 2
) -> bytes:
    numbers = bytes(int(number) for number in version.split("."))
    return struct.pack("<4sIQQ4s4sQ16xQ", magic, 0, layout, size_bytes, numbers, magic, bits, 512)


def make_plan_file(**header: Any) -> bytes:
    """A file of 4096 bytes, whatever its header says."""
    return make_header(**header).ljust(4096, b"\x5a")


def make_machine(
    generation: str | None = "sm89", *, driver: str = "580.65.06", memory_bytes: int = 24 << 30,
    free_bytes: int | None = None, version: str | None = VERSION, cuda_major: int = 13, system: str = LINUX,
) -> Machine:  # fmt: skip
    libraries: Mapping[Any, InstalledLibrary] = (
        {} if version is None else {"tensorrt-rtx": InstalledLibrary(version, cuda_major)}
    )
    if generation is None:
        return Machine(system, (), libraries)
    record = GpuRecord(
        name="NVIDIA GeForce RTX 4090", generation=generation, memory_bytes=memory_bytes, driver=driver, cuda="13.0"
    )
    return Machine(system, (Gpu(record, memory_bytes if free_bytes is None else free_bytes),), libraries)


def with_plans(manifest: BundleManifest, plans: Mapping[str, Sequence[PlanRecord]]) -> BundleManifest:
    """The manifest with these plans by component; the other components have none, and no backend of plans."""
    components = {
        name: record.model_copy(
            update={"plans": tuple(plans[name]), "backend": TensorRTSettings(kind="tensorrt-rtx")}
        )
        if name in plans
        else record
        for name, record in manifest.components.items()
    }  # fmt: skip
    return manifest.model_copy(update={"components": components})


def write_plan_bundle(folder: Path, files: Mapping[str, bytes], plans: Sequence[PlanRecord]) -> BundleManifest:
    """A bundle whose UNet has these plans and plan files; the digests fit the files."""
    made = make_bundle(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {
        name: FileRecord(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for name, data in files.items()
    }
    manifest = with_plans(made.manifest.model_copy(update={"files": digests}), {ComponentName.UNET: plans})
    write_manifest(folder, manifest)
    return manifest
