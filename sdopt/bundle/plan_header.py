"""The first 64 bytes of a TensorRT plan: what it says of itself, read without TensorRT.

NVIDIA documents no layout. This one was observed: a plan of TensorRT-RTX 1.7.1.116 for every generation that it builds
for, for several together and for the portable default, and networks of several sizes. TensorRT-RTX's own header check
reads the same 64 bytes (`Runtime.engine_header_size`).

    0   `vtrt`; general TensorRT's plans begin with `ftrt`, of which nothing more is known here
    8   u64, 2: taken for the number of the layout
    16  u64, the size of the whole file
    24  version: major, minor, patch, build, one byte each
    28  `vtrt` again
    32  u64, a bit for each generation that the plan runs on
    56  u64, bytes of the weights on the GPU, 0 where they are streamed
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from sdopt.bundle.records import PlanRecord
from sdopt.errors import ArtifactError
from sdopt.machine.machine_record import PlanFlavour
from sdopt.model.target import PORTABLE, Runtime, Target

HEADER_BYTES = 64
RTX_GENERATIONS = {"sm75": 0x01, "sm80": 0x02, "sm86": 0x04, "sm89": 0x08, "sm120": 0x10, "sm121": 0x20}
"""What TensorRT-RTX 1.7 builds for, and the bit of each."""
_PORTABLE_GENERATIONS = frozenset({"sm80", "sm86", "sm89", "sm120", "sm121"})
_LAST_NAMED = 121
_LATER_BIT = 0x40
_RTX, _GENERAL = b"vtrt", b"ftrt"
_LAYOUT = 2


@dataclass(frozen=True)
class PlanHeader:
    """What a plan's header says. Only the flavour is known of general TensorRT's: the rest is empty there."""

    flavour: PlanFlavour
    version: str = ""
    generation: str = ""
    """`sm89`, several with commas, or `ampere+`."""
    size_bytes: int | None = None
    weights_bytes: int | None = None


def runs_portable(generation: str) -> bool:
    """Whether a GPU runs TensorRT-RTX's portable plan, which names 8.0, 8.6, 8.9, 12.0, 12.1 and all later.

    The data centre's 9.0 and 10.x and the modules' 8.7 and 11.0 lie between and are refused: measured for 9.0 with
    TensorRT-RTX 1.7 ("TensorRT-RTX does not support this compute capability").
    """
    return generation in _PORTABLE_GENERATIONS or int(generation.removeprefix("sm")) > _LAST_NAMED


def find_rtx_target(generation: str) -> Target | None:
    """The target that builds TensorRT-RTX plans for a GPU; None where TensorRT-RTX runs no plan at all."""
    if generation in RTX_GENERATIONS:
        return Target(Runtime.RTX, (generation,))
    return Target(Runtime.RTX) if runs_portable(generation) else None


def read_plan_header(path: Path) -> PlanHeader | None:
    """None for a header of another layout. Raises `ArtifactError` for a file too short to have one."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) < HEADER_BYTES:
        raise ArtifactError(f"{path} is not a plan of TensorRT: it has {len(raw)} bytes")
    if raw.startswith(_GENERAL):
        return PlanHeader("tensorrt")
    layout, size_bytes = struct.unpack_from("<QQ", raw, 8)
    if not raw.startswith(_RTX) or raw[28:32] != _RTX or layout != _LAYOUT:
        return None
    (bits,) = struct.unpack_from("<Q", raw, 32)
    (weights_bytes,) = struct.unpack_from("<Q", raw, 56)
    version = ".".join(str(number) for number in raw[24:28])
    return PlanHeader("tensorrt-rtx", version, _name_generations(bits), size_bytes, weights_bytes)


def _name_generations(bits: int) -> str:
    if bits & _LATER_BIT:
        return PORTABLE
    return ",".join(name for name, bit in RTX_GENERATIONS.items() if bits & bit) or "no generation that is known"


def find_contradictions(folder: Path, plan: PlanRecord) -> list[str]:
    """One sentence for each thing that a plan file says of itself otherwise than its record, digests aside."""
    path = folder / plan.file
    size_bytes = path.stat().st_size
    if size_bytes < HEADER_BYTES:
        return [f"{plan.file} is not a plan of TensorRT: it has {size_bytes} bytes"]
    header = read_plan_header(path)
    if header is None:
        # Other versions may have another header; of this one every plan has been seen to have it.
        known = plan.flavour == "tensorrt-rtx" and plan.version.startswith("1.7.")
        return [f"{plan.file} does not begin as a plan of TensorRT-RTX {plan.version} does"] if known else []
    if header.flavour != plan.flavour:
        return [f"{plan.file} is a plan of {header.flavour}, and the manifest says {plan.flavour}"]
    found: list[str] = []
    if header.size_bytes not in (None, size_bytes):
        found.append(f"{plan.file} has {size_bytes} bytes, and its own header says {header.size_bytes}")
    if header.version not in ("", _fold_version(plan.version)):
        found.append(f"{plan.file} is of {header.flavour} {header.version}, and the manifest says {plan.version}")
    if header.generation not in ("", plan.generation):
        found.append(f"{plan.file} is for {header.generation}, and the manifest says {plan.generation}")
    return found


def _fold_version(version: str) -> str:
    """A version as a header can hold it, one byte for each number."""
    return ".".join(str(int(number) % 256) if number.isdecimal() else number for number in version.split("."))
