"""A bundle of tiny-shapes with LoRA slots, and adapter files for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdopt.bundle.manifest import read_manifest, write_manifest
from sdopt.bundle.records import SlotsRecord
from sdopt.convert.slot_graphs import SlotJob, write_slots
from sdopt.disk.file_records import record_file
from sdopt.model.file_names import SLOTS_GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.slots import SlotSet
from sdopt.weights.safetensors_header import read_header


def add_slots_to(bundle: Path, folder: Path, layers: SlotSet = SlotSet.ALL, rank: int = 32) -> Path:
    """A copy of the bundle with slots, as `sdopt convert --lora-slots` makes it, without parity."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    components, files = dict(manifest.components), dict(manifest.files)
    for name in (name for name in manifest.components if name.takes_adapters):
        audit = components[name].audit
        graph = write_slots(SlotJob(folder / name, layers, audit.attention_layers))
        slots = SlotsRecord(layers=layers, rank=rank, slots=graph.slots, words=graph.words, audit=graph.audit)
        components[name] = components[name].model_copy(update={"slots": slots})
        files[f"{name}/{SLOTS_GRAPH_NAME}"] = record_file(folder / name / SLOTS_GRAPH_NAME)
    recipe = manifest.recipe.model_copy(update={"lora_slots": f"{layers}:{rank}"})
    write_manifest(folder, manifest.model_copy(update={"components": components, "files": files, "recipe": recipe}))
    return folder


def write_lora(
    path: Path, bundle: Path, seed: int, *, rank: int = 4, strength: float = 0.5,
    endings: Iterable[str] = ("to_q", "to_v", "to_out.0", "ff.net.2", "q_proj", "fc1"),
) -> Path:  # fmt: skip
    """An adapter file in PEFT's names, with seeded weights in every layer of these endings."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for component, prefix in (("unet", "unet"), ("text_encoder", "text_encoder.text_model")):
        for key, ref in read_header(bundle / component / WEIGHTS_NAME).tensors.items():
            layer = key.removesuffix(".weight")
            if len(ref.shape) < 2 or not layer.endswith(tuple(endings)):
                continue
            out_width, *inputs = ref.shape
            down = torch.randn(rank, *inputs, generator=generator) / torch.tensor(inputs).prod().sqrt()
            up = torch.randn(out_width, rank, *(1 for _ in inputs[1:]), generator=generator) * strength / rank**0.5
            tensors |= {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    save_file(tensors, path)
    return path
