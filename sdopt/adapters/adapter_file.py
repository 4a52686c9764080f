"""An adapter file as its header describes it: no tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from sdopt.adapters.factors import find_rank, has_kernel, matrix_shape
from sdopt.adapters.header import DOWNLOAD_AGAIN, find_file, open_header, refuse_keys
from sdopt.adapters.keys import LayerKind, find_gap, find_kinds, split_key
from sdopt.adapters.metadata import FewStep, PeftSettings, name_writer, read_metadata, read_peft_settings
from sdopt.adapters.stems import split_stem
from sdopt.errors import AdapterError, SdoptError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.weights.safetensors_header import TensorRef, quantised_error

_SIDECAR_LIMIT_BYTES = 1_000_000
# The width of the text that the UNets of published models attend to.
TEXT_WIDTHS = {768: Family.SD1, 1024: Family.SD2, 2048: Family.SDXL, 1280: Family.SDXL_REFINER}


class AdapterKind(StrEnum):
    """As people call a whole file."""

    LORA = "LoRA"
    LOCON = "LoCon"
    LOHA = "LoHa"
    LOKR = "LoKr"
    FULL = "full difference"
    DORA = "DoRA"
    MIXED = "mixed"


@dataclass(frozen=True)
class FileLayer:
    """What a file holds for one layer. `kind` is None where it changes the bias alone."""

    stem: str
    component: ComponentName
    flat: str
    """The layer's name in its network, with underscores for dots."""
    kind: LayerKind | None
    rank: int
    """Of its factors in the file, 0 for a difference that is written out."""
    parts: Mapping[str, TensorRef]

    @property
    def is_decomposed(self) -> bool:
        """DoRA: the changed weight gets magnitudes of the file's."""
        return "dora_scale" in self.parts or "magnitude" in self.parts


@dataclass(frozen=True)
class AdapterFile:
    """`ranks` are the least and the largest of its low-rank factors, (0, 0) where it has none. `family` is the base
    model's as shapes say, or else the metadata; None where neither does.
    """

    path: Path
    size_bytes: int
    kind: AdapterKind
    writer: str
    family: Family | None
    ranks: tuple[int, int]
    layers: tuple[FileLayer, ...]
    title: str
    trigger_words: tuple[str, ...]
    tags: Mapping[str, int]
    base_model: str
    few_step: FewStep | None
    embeddings: tuple[str, ...]
    """Words whose embeddings OneTrainer has put into the file."""
    peft: Mapping[str, PeftSettings] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def alias(self) -> str:
        """The name that prompts may call it by beside the file's: `ss_output_name`, or ""."""
        name = self.metadata.get("ss_output_name", "")
        return "" if name == "None" else name

    @property
    def network_alpha(self) -> float | None:
        """kohya's alpha of the training, where the metadata has it; each layer's own is in the file."""
        try:
            return float(self.metadata.get("ss_network_alpha", ""))
        except ValueError:
            return None

    @property
    def layer_counts(self) -> dict[ComponentName, int]:
        counts = Counter(layer.component for layer in self.layers)
        return {component: counts[component] for component in ComponentName if counts[component]}


def read_adapter_file(path: Path) -> AdapterFile:
    """Header and metadata of a LoRA or LyCORIS file, or of the folder that diffusers or PEFT wrote it to.

    Raises `AdapterError` for a file that is something else, is a pickle, or has half a layer, and `CheckpointError` or
    `UnsafeInputError` for one that is no sound safetensors file.
    """
    path = find_file(Path(path))
    header = open_header(path)
    stems: dict[str, dict[str, TensorRef]] = {}
    others: list[str] = []
    embeddings: dict[str, None] = {}
    for key, ref in header.tensors.items():
        if key.startswith("bundle_emb."):  # OneTrainer: bundle_emb.WORD.clip_l
            embeddings[key.split(".")[1]] = None
        elif (split := split_key(key)) is None:
            others.append(key)
        elif stems.setdefault(split[0], {}).setdefault(split[1], ref) is not ref:
            raise AdapterError(f"{path} has two tensors for the {split[1]} of {split[0]}", hint=DOWNLOAD_AGAIN)
    if others or not stems:
        refuse_keys(path, header, others, len(stems))
    layers = tuple(_read_layer(path, stem, parts) for stem, parts in stems.items())
    said = read_metadata(header.metadata, path.stem)
    ranks = [layer.rank for layer in layers if layer.rank]
    return AdapterFile(
        path=path, size_bytes=path.stat().st_size, kind=_name_file(layers),
        writer=name_writer(header.metadata, header.tensors), family=_guess_family(layers) or said.family,
        ranks=(min(ranks, default=0), max(ranks, default=0)), layers=layers, title=said.title,
        trigger_words=said.trigger_words, tags=said.tags, base_model=said.base_model, few_step=said.few_step,
        embeddings=tuple(embeddings), peft=read_peft_settings(header.metadata, _read_sidecar(path), str(path)),
        metadata=header.metadata,
    )  # fmt: skip


def is_adapter(path: Path) -> bool:
    """Whether a file or folder has a part of an adapter in it, sound or not. False for what cannot be read."""
    try:
        return any(split_key(key) for key in open_header(find_file(path)).tensors)
    except SdoptError:
        return False


def _read_layer(path: Path, stem: str, parts: Mapping[str, TensorRef]) -> FileLayer:
    kinds = find_kinds(parts)
    kind = kinds[0] if kinds else None
    if gap := find_gap(parts):
        raise AdapterError(f"{path}: {stem} is not whole: {gap}", hint=DOWNLOAD_AGAIN)
    for part, ref in parts.items():
        if part == "alpha" and math.prod(ref.shape) != 1:
            raise AdapterError(f"{path}: the alpha of {stem} is not a number: {list(ref.shape)}", hint=DOWNLOAD_AGAIN)
        if part != "alpha" and not ref.dtype.is_float:
            raise quantised_error(path, f"{stem}.{part}", str(ref.dtype))
    try:
        rank = find_rank(kind, {part: ref.shape for part, ref in parts.items()}) if kind else 0
    except ValueError as error:
        raise AdapterError(
            f"{path}: the shapes of {stem} contradict each other: {error}", hint=DOWNLOAD_AGAIN
        ) from None
    return FileLayer(stem, *split_stem(stem), kind, rank, parts)


def _shapes(layer: FileLayer) -> dict[str, tuple[int, ...]]:
    return {part: ref.shape for part, ref in layer.parts.items()}


def _name_file(layers: tuple[FileLayer, ...]) -> AdapterKind:
    if any(layer.is_decomposed for layer in layers):
        return AdapterKind.DORA
    kinds = {layer.kind for layer in layers if layer.kind is not None and not _is_norm(layer)}
    if len(kinds) > 1:
        return AdapterKind.MIXED
    match next(iter(kinds), LayerKind.FULL):
        case LayerKind.HADAMARD:
            return AdapterKind.LOHA
        case LayerKind.KRONECKER:
            return AdapterKind.LOKR
        case LayerKind.FULL:
            return AdapterKind.FULL
        case LayerKind.LOW_RANK:
            return AdapterKind.LOCON if any(has_kernel(_shapes(layer)) for layer in layers) else AdapterKind.LORA


def _is_norm(layer: FileLayer) -> bool:
    """LyCORIS trains norms beside layers of any kind."""
    return layer.kind is LayerKind.FULL and len(layer.parts["diff"].shape) == 1


def _guess_family(layers: tuple[FileLayer, ...]) -> Family | None:
    """By the width of the text that the UNet attends to, or else by the text encoders."""
    for layer in layers:
        if layer.kind and reads_text(layer.component, layer.flat):
            width = matrix_shape(layer.kind, _shapes(layer))[1]
            if width in TEXT_WIDTHS:
                return TEXT_WIDTHS[width]
    return Family.SDXL if any(layer.component is ComponentName.TEXT_ENCODER_2 for layer in layers) else None


def reads_text(component: ComponentName, flat: str) -> bool:
    """Whether a layer's input is the text that the UNet attends to."""
    return component is ComponentName.UNET and flat.endswith(("attn2_to_k", "attn2_to_v"))


def _read_sidecar(path: Path) -> str:
    """The text of the `adapter_config.json` that PEFT puts beside its file, or ""."""
    place = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not place.is_file() or place.stat().st_size > _SIDECAR_LIMIT_BYTES:
        return ""
    return place.read_text(encoding="utf-8", errors="replace")
