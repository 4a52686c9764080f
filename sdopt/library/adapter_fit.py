"""Whether the engines of a bundle take an adapter, and if not, why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.adapters.adapter_file import AdapterFile
from sdopt.adapters.match_layers import match_layers, shapes_of_layers
from sdopt.adapters.resolve import resolve_adapter
from sdopt.bundle.again import variant_command
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.weights.safetensors_header import TensorRef, read_header

_NETWORKS = (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2, ComponentName.UNET)


@dataclass(frozen=True)
class BundleSlots:
    """`layers` are those that an adapter may change, `rank` the most that all active ones may have together."""

    layers: Mapping[ComponentName, Collection[str]]
    rank: int


def find_slots(manifest: BundleManifest) -> BundleSlots | None:
    """The slots of a bundle; None where it has none."""
    records = manifest.components.items()
    slotted = {name: record.lora_slots for name, record in records if record.lora_slots is not None}
    if not slotted:
        return None
    layers = {name: {slot.layer for slot in slots.slots} for name, slots in slotted.items()}
    return BundleSlots(layers, min(slots.rank for slots in slotted.values()))


def describe_fit(file: AdapterFile, bundle: Path) -> dict[str, Any]:
    """`taken` says whether it can be loaded; `reason` and `hint` say why not, and `fit_error` by how much the worst
    layer differs that was brought to the slots' rank. Raises `ArtifactError` where there is no sound bundle.
    """
    folder = open_links(bundle)
    manifest = read_manifest(folder)
    base = {name: read_weights(folder, name) for name in _NETWORKS if (folder / name / WEIGHTS_NAME).is_file()}
    layers = {name: shapes_of_layers(tensors) for name, tensors in base.items()}
    answer: dict[str, Any] = {"bundle": str(bundle), "taken": False, "reason": "", "hint": "", "fit_error": None}
    slots = find_slots(manifest)
    try:
        if slots is None:
            matched = len(match_layers(file, layers))
            raise AdapterError(
                f"the model has all {matched} layers that it changes, and this bundle has no LoRA slots",
                hint=f"build them: {variant_command(f'--lora-slots all:{max(64, file.ranks[1])}', bundle)}",
            )
        adapter = resolve_adapter(file, layers, slots=slots.layers, rank_limit=slots.rank, base=base)
    except AdapterError as error:
        return answer | {"reason": error.message, "hint": error.hint}
    errors = [error for fits in adapter.fit_errors.values() for error in fits.values()]
    return answer | {"taken": True, "fit_error": max(errors, default=None)}


def read_weights(folder: Path, name: ComponentName) -> Mapping[str, TensorRef]:
    return read_header(folder / name / WEIGHTS_NAME).tensors
