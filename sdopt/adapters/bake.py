"""Adapters that are added to a model's weights before anything is traced or calibrated.

The sums are made in fp32, and rounded once to the type that the model has. What changes is written to a file of the
store, which the model's tensors then name; the others are read from where they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdopt import progress
from sdopt.adapters.adapter_file import AdapterFile, read_adapter_file
from sdopt.adapters.match_layers import shapes_of_layers
from sdopt.adapters.merge import weight_changes
from sdopt.bundle.records import BakedAdapter
from sdopt.disk.digest import digest_of
from sdopt.disk.files import disk_errors, hash_file
from sdopt.disk.store import Store
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraChoice
from sdopt.model.precision import DType
from sdopt.weights.dtypes import numpy_dtype
from sdopt.weights.safetensors_header import TensorRef, read_header
from sdopt.weights.stream import identify_weights
from sdopt.weights.tensor_layout import plan_layout

STAGE = "baked"
# Raise it when the sums change: nothing of before is used again.
_FORMAT = 1
_Tensors = Mapping[ComponentName, Mapping[str, TensorRef]]
_Difference = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Baked:
    """All tensors by component, and what was added to them."""

    components: Mapping[ComponentName, Mapping[str, TensorRef]]
    adapters: tuple[BakedAdapter, ...]


@dataclass(frozen=True)
class _Chosen:
    choice: LoraChoice
    file: AdapterFile
    sha256: str

    def strength(self, component: ComponentName) -> float:
        return self.choice.unet if component is ComponentName.UNET else self.choice.text


def bake(
    components: Mapping[ComponentName, Mapping[str, TensorRef]], loras: Sequence[LoraChoice], store: Store
) -> Baked:  # fmt: skip
    """The tensors of every component, with the adapters in those of the UNet and the text encoders.

    Raises `AdapterError` for a file that is not an adapter of this model, or whose sum a type cannot hold.
    """
    if not loras:
        return Baked(components, ())
    chosen = []
    for lora in loras:
        path = Path(lora.source).expanduser()
        chosen.append(_Chosen(lora, read_adapter_file(path), hash_file(path)))
    tensors = {name: own for name, own in components.items() if name.takes_adapters}
    key = digest_of(
        [_FORMAT, [[each.sha256, each.choice.unet, each.choice.text] for each in chosen],
         {name: identify_weights(part, DType.FP32) for name, part in tensors.items()}]
    )  # fmt: skip
    folder = store.make(STAGE, key, lambda target: _write_all(target, chosen, tensors))
    changed = {ComponentName(path.stem): read_header(path).tensors for path in sorted(folder.glob("*.safetensors"))}
    adapters = tuple(
        BakedAdapter(name=each.file.path.stem, sha256=each.sha256, unet=each.choice.unet, text=each.choice.text)
        for each in chosen
    )
    return Baked({name: {**own, **changed.get(name, {})} for name, own in components.items()}, adapters)


def _write_all(target: Path, chosen: Sequence[_Chosen], tensors: _Tensors) -> dict[str, str]:
    """A file for each component that changes, of its changed tensors; returns their digests."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        found = [_keep_differences(each, tensors, Path(work) / str(number)) for number, each in enumerate(chosen)]
        written = {}
        for name, own in tensors.items():
            parts = [(each.strength(name), kept.get(name, {})) for each, kept in zip(chosen, found, strict=True)]
            names = sorted({tensor for strength, kept in parts if strength for tensor in kept})
            if names:
                path = target / f"{name}.safetensors"
                with disk_errors(path):
                    _write(path, {tensor: own[tensor] for tensor in names}, parts)
                    # Weights are known by their file's time. A store that was emptied makes this one again, with the
                    # same bytes.
                    os.utime(path, (0, 0))
                written[path.name] = hash_file(path)
    return written


def _keep_differences(
    chosen: _Chosen, tensors: _Tensors, folder: Path
) -> dict[ComponentName, dict[str, Path]]:  # fmt: skip
    """The adapter's changes at strength 1, each in a file: an adapter of all layers is as large as its model."""
    layers = {name: shapes_of_layers(own) for name, own in tensors.items()}
    kept: dict[ComponentName, dict[str, Path]] = {}
    folder.mkdir(parents=True)
    for number, change in enumerate(weight_changes(chosen.file, layers, tensors)):
        progress.update(f"adding {chosen.file.path.name} to the weights", 0.0)
        path = folder / f"{number}.npy"
        np.save(path, change.difference, allow_pickle=False)
        kept.setdefault(change.component, {})[change.tensor] = path
    return kept


def _write(
    path: Path, tensors: Mapping[str, TensorRef], parts: Sequence[tuple[float, Mapping[str, Path]]]
) -> None:  # fmt: skip
    layout = plan_layout(path, {name: (ref.dtype, ref.shape) for name, ref in tensors.items()})
    with path.open("wb") as file:
        file.write(layout.header)
        for name, place in layout.tensors.items():
            gains = [
                np.float32(strength) * np.load(kept[name], allow_pickle=False)
                for strength, kept in parts
                if strength and name in kept
            ]
            total = _read(tensors[name]) + sum(gains[1:], start=gains[0])
            with np.errstate(over="ignore"):  # it is looked for below
                rounded = total.astype(numpy_dtype(place.dtype))
            if not np.isfinite(rounded.astype(np.float32)).all():
                raise AdapterError(
                    f"{name} with the adapters in it is too large for {place.dtype}",
                    hint="give them smaller weights",
                )
            file.seek(place.offset_bytes)
            file.write(rounded.tobytes())


def _read(ref: TensorRef) -> _Difference:
    """A tensor in fp32, in memory of its own."""
    shape = tuple(reversed(ref.shape)) if ref.transposed else ref.shape
    stored = np.memmap(ref.file, numpy_dtype(ref.dtype), "r", ref.offset_bytes, shape)
    value: _Difference = np.array(stored.T if ref.transposed else stored, dtype=np.float32)
    return value
