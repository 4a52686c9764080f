"""Layers of a file -> layers of a bundle: all of them, or an error that says which are not there and why."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdopt.adapters.adapter_file import TEXT_WIDTHS, AdapterFile, FileLayer, reads_text
from sdopt.adapters.factors import matrix_shape
from sdopt.adapters.keys import LayerKind
from sdopt.adapters.stems import index_layers
from sdopt.adapters.tensor_bytes import TensorReader
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.weights.safetensors_header import TensorRef

Layers = Mapping[ComponentName, Mapping[str, tuple[int, ...]]]
_WEIGHT = ".weight"
Unlike = tuple[FileLayer, tuple[int, ...]]
_UNET, _TEXT, _TEXT_2 = ComponentName.UNET, ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
# Blocks of diffusion transformers.
_FOREIGN = re.compile(
    "double_blocks|single_blocks|single_transformer_blocks|joint_blocks|transformer_transformer_blocks"
)


@dataclass(frozen=True)
class Match:
    """A layer of the file, and the layer of the bundle that it changes. `shape` is its weight's."""

    component: ComponentName
    layer: str
    shape: tuple[int, ...]
    of_file: FileLayer


def shapes_of_layers(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """The layers of one network that have a weight, with its shape, from the network's tensors by name."""
    return {key.removesuffix(_WEIGHT): ref.shape for key, ref in tensors.items() if key.endswith(_WEIGHT)}


def match_layers(file: AdapterFile, layers: Layers) -> list[Match]:
    """In the order of the file. Raises `AdapterError` unless each of its layers is one of the bundle, in name and in
    shape, and none is there twice.
    """
    indices = {component: index_layers(component, shapes) for component, shapes in layers.items()}
    matches: dict[tuple[ComponentName, str], Match] = {}
    unknown: list[FileLayer] = []
    unlike: list[Unlike] = []
    for each in file.layers:
        component = _find_component(each, layers)
        layer = indices.get(component, {}).get(each.flat)
        if layer is None:
            unknown.append(each)
            continue
        shape = layers[component][layer]
        if not _fits(each, shape):
            unlike.append((each, shape))
        if (component, layer) in matches:
            raise AdapterError(
                f"{file.path} changes {component}'s {layer} twice: as {matches[component, layer].of_file.stem} and as "
                f"{each.stem}",
                hint="take the file as its maker wrote it",
            )
        matches[component, layer] = Match(component, layer, shape, each)
    if unknown or unlike:
        _require_family(file, layers)
        idle = _find_idle(file, unknown)
        unknown = [each for each in unknown if each.stem not in idle]
    if unknown or unlike or not matches:
        _refuse(file, unknown, unlike, len(matches))
    return list(matches.values())


def keep_slots(file: AdapterFile, matches: list[Match], slots: Mapping[ComponentName, Collection[str]]) -> list[Match]:
    """Those that are to be loaded. Raises `AdapterError` where a layer that the file changes has no slot."""
    sets = {component: frozenset(names) for component, names in slots.items()}
    lacking = [match for match in matches if match.layer not in sets.get(match.component, ())]
    idle = _find_idle(file, [match.of_file for match in lacking])
    lacking = [match for match in lacking if match.of_file.stem not in idle]
    if not lacking:
        return [match for match in matches if match.layer in sets.get(match.component, ())]
    if not any(sets.values()):
        message = f"{file.path.name} cannot be loaded: the engines have no LoRA slots"
    else:
        message = (
            f"{file.path.name}: {_count(lacking, 'layer has', 'layers have')} no slot in the engines, among them "
            f"{_list(f'{match.component}.{match.layer}' for match in lacking)}"
        )
    rank = max(64, file.ranks[1])
    raise AdapterError(message, hint=f"build slots for them: sdopt convert MODEL --lora-slots all:{rank}")


def _find_idle(file: AdapterFile, layers: Sequence[FileLayer]) -> set[str]:
    """The stems of those that change nothing, because `up` is all zeros.

    ComfyUI's LoRA extraction writes a pair for every matrix, trained or not: those of embeddings, and of a text
    projection that Stable Diffusion's CLIP-L does not have.
    """
    pairs = [each for each in layers if each.kind is LayerKind.LOW_RANK and "diff_b" not in each.parts]
    with TensorReader(file.path) as reader:
        return {each.stem for each in pairs if not reader.read(each.parts["up"]).any()}


def bake_hint(file: AdapterFile) -> str:
    return f"merge it into the weights: sdopt convert MODEL --lora {shlex.quote(str(file.path))}"


def _find_component(layer: FileLayer, layers: Layers) -> ComponentName:
    """SDXL's refiner has only the second text encoder, which trainers call the only one."""
    alone = layer.component is _TEXT and _TEXT not in layers and _TEXT_2 in layers
    return _TEXT_2 if alone else layer.component


def _fits(layer: FileLayer, shape: tuple[int, ...]) -> bool:
    if not shape:
        return False
    matrix = (shape[0], math.prod(shape[1:]))
    if "diff_b" in layer.parts and layer.parts["diff_b"].shape != shape[:1]:
        return False
    if layer.is_decomposed and not _fits_magnitude(layer, shape):
        return False
    return layer.kind is None or _matrix(layer) == matrix


def _fits_magnitude(layer: FileLayer, shape: tuple[int, ...]) -> bool:
    part = "magnitude" if "magnitude" in layer.parts else "dora_scale"
    sides = math.prod(layer.parts[part].shape)
    return len(shape) > 1 and sides in (shape[:1] if part == "magnitude" else shape[:2])


def _matrix(layer: FileLayer) -> tuple[int, int]:
    assert layer.kind is not None
    return matrix_shape(layer.kind, {part: ref.shape for part, ref in layer.parts.items()})


def _require_family(file: AdapterFile, layers: Layers) -> None:
    whose, what = _compare_families(file, layers)
    if whose:
        raise AdapterError(f"{file.path.name} is made for {whose}: {what}", hint=_inspect_hint(file))


def _inspect_hint(file: AdapterFile) -> str:
    return f"see what it is made for: sdopt inspect {shlex.quote(str(file.path))}"


def _refuse(file: AdapterFile, unknown: list[FileLayer], unlike: list[Unlike], known: int) -> None:
    hint = _inspect_hint(file)
    if not known:
        raise AdapterError(
            f"{file.path.name} changes {len(file.layers)} layers, and the model has none of them, among them "
            f"{_list(each.stem for each in file.layers)}",
            hint=hint,
        )
    if unknown:
        raise AdapterError(
            f"{file.path.name} changes {len(file.layers)} layers, and the model does not have {len(unknown)} of them, "
            f"among them {_list(each.stem for each in unknown)}",
            hint=hint,
        )
    first, shape = unlike[0]
    made = f", and the file changes one of {list(_matrix(first))} as a matrix" if first.kind else ""
    raise AdapterError(
        f"{file.path.name}: {_count(unlike, 'layer has', 'layers have')} another shape than the model's, among them "
        f"{first.stem}: the model's weight is {list(shape)}{made}",
        hint=hint,
    )


def _compare_families(file: AdapterFile, layers: Layers) -> tuple[str, str]:
    """(The file's family, why it is not the model's), both "" where they do not differ: by the widths of the texts
    that the UNets attend to, and by whether there is a second text encoder.
    """
    theirs = next((_matrix(each)[1] for each in file.layers if each.kind and reads_text(each.component, each.flat)), 0)
    ours = next((shape[1] for name, shape in layers.get(_UNET, {}).items() if name.endswith("attn2.to_k")), 0)
    family = family_of(layers)
    model = f"the model is {family.label}" if family else "the model is of another family"
    said = file.family.label if file.family else f"a UNet whose text is {theirs} numbers wide"
    if theirs and ours and theirs != ours:
        return said, f"{model}, whose text is {ours} numbers wide a token and not {theirs}"
    second = any(each.component is _TEXT_2 for each in file.layers)
    if second and _TEXT_2 not in layers:
        return said, f"it changes a second text encoder, and {model}, which has one"
    if any(_FOREIGN.search(each.flat) for each in file.layers):
        return file.base_model or "a diffusion transformer such as Flux", f"{model}, which is a UNet"
    return "", ""


def family_of(layers: Layers) -> Family | None:
    """The family of a bundle by the shapes of its layers, None for shapes that no published model has."""
    names = layers.get(_UNET, {})
    widths = (shape[1] for name, shape in names.items() if name.endswith("attn2.to_k") and len(shape) > 1)
    found = TEXT_WIDTHS.get(next(widths, 0))
    if found is None and "add_embedding.linear_1" in names:
        return Family.SDXL if _TEXT in layers else Family.SDXL_REFINER
    return found


def _list(names: Iterable[str]) -> str:
    """The first three."""
    return ", ".join(itertools.islice(names, 3))


def _count(things: Sequence[object], one: str, many: str) -> str:
    return f"1 {one}" if len(things) == 1 else f"{len(things)} {many}"
