"""The header of an adapter's file: found, limited to what an adapter can need, named where it is something else."""

from __future__ import annotations

import shlex
import struct
from pathlib import Path

from sdopt.adapters.keys import name_other_kind
from sdopt.errors import AdapterError
from sdopt.weights.safetensors_header import SafetensorsFile, read_header
from sdopt.weights.tensor_kinds import name_kind

# SDXL with every layer as LoKr and DoRA has some 9,000 tensors, and the tag tables of a large training a few MB.
_TENSOR_LIMIT = 20_000
# Each tensor has two; unlike a word, a bracket cannot be written in another way.
_BRACKET_LIMIT = 100_000
_HEADER_LIMIT_BYTES = 32_000_000
_NAME_LIMIT_CHARACTERS = 400
# In a folder that diffusers or PEFT wrote.
_FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# What torch saves is a zip, and was a bare pickle before.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CONVERT = "import sys, torch; from safetensors.torch import save_file as s; s(torch.load(sys.argv[1]), sys.argv[2])"
DOWNLOAD_AGAIN = "download the file again"


def find_file(path: Path) -> Path:
    """The path, or in a folder the file that diffusers or PEFT wrote. Raises `AdapterError` where there is none."""
    if not path.is_dir():
        return path
    found = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
    if not found:
        names = " or ".join(_FOLDER_FILES)
        raise AdapterError(f"{path} is a folder without {names}", hint="give the adapter's file")
    return found[0]


def open_header(path: Path) -> SafetensorsFile:
    """Refuses what is far too large for an adapter before it is parsed: `AdapterError`."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            size_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            is_whole = size_bytes <= path.stat().st_size - 8
            raw = file.read(size_bytes) if size_bytes <= _HEADER_LIMIT_BYTES else b""
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}", hint="give a .safetensors file") from error
    if not is_whole and prefix.startswith(_PICKLE_STARTS):
        _refuse_pickle(path)
    many = raw.count(b'"data_offsets"') > _TENSOR_LIMIT or raw.count(b"[") > _BRACKET_LIMIT
    if is_whole and (size_bytes > _HEADER_LIMIT_BYTES or many):
        raise AdapterError(
            f"{path} is not an adapter: its header is larger than one needs, {size_bytes / 1e6:.0f} MB",
            hint=f"see what it is: {_inspect(path)}",
        )
    header = read_header(path)
    long = next((key for key in header.tensors if len(key) > _NAME_LIMIT_CHARACTERS), None)
    if long:
        raise AdapterError(
            f"{path} has a tensor whose name has {len(long)} characters: {long[:40]}…", hint=DOWNLOAD_AGAIN
        )
    return header


def refuse_keys(path: Path, header: SafetensorsFile, others: list[str], layers: int) -> None:
    """Raise `AdapterError` for a file with tensors `others` that belong to none of its `layers` layers."""
    other = name_other_kind(others)
    if other:
        raise AdapterError(
            f"{path} is {other}, and sdopt reads LoRA, LoCon, LoHa, LoKr, DoRA and full differences",
            hint="merge it into a checkpoint with the tool that made it, and convert that",
        )
    kind, hint = _name(path, others)
    if layers and "IP-Adapter" not in kind:
        raise AdapterError(
            f"{path}: {len(others)} of its {len(header.tensors)} tensors are not parts of an adapter, among them "
            f"{min(others)[:80]!r}",
            hint="take the file as its maker wrote it",
        )
    raise AdapterError(f"{path} is not an adapter: it is {kind}", hint=hint)


def _name(path: Path, keys: list[str]) -> tuple[str, str]:
    """What a file of other tensors is, and what to do with it."""
    if not keys:
        return "empty", DOWNLOAD_AGAIN
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "a Stable Diffusion checkpoint", f"build engines for it: sdopt convert {shlex.quote(str(path))}"
    if "lora_controlnet" in keys:
        return "a Control-LoRA, which is a ControlNet", "give a LoRA or LyCORIS file"
    kind = name_kind(keys)
    hint = "give it when the model is converted, with --vae" if "VAE" in kind else "give a LoRA or LyCORIS file"
    return kind if kind and "LoRA" not in kind else "a file of other tensors", hint


def _refuse_pickle(path: Path) -> None:
    words = ["python", "-c", _CONVERT, str(path), str(path.with_suffix(".safetensors"))]
    raise AdapterError(
        f"{path} is a pickle, which can run code when it is opened; sdopt reads adapters from safetensors only",
        hint=f"convert it: {shlex.join(words)}",
    )


def _inspect(path: Path) -> str:
    return f"sdopt inspect {shlex.quote(str(path))}"
