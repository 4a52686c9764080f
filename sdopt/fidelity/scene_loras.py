"""The LoRAs of a scene, in whatever draws it: in the slots of engines, or added to the weights of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdopt.adapters.adapter_file import read_adapter_file
from sdopt.adapters.match_layers import shapes_of_layers
from sdopt.adapters.merge import weight_changes
from sdopt.adapters.resolve import ERROR_LIMIT
from sdopt.backends.torch_eager import TorchSession
from sdopt.model.component import ComponentName
from sdopt.model.lora import LoraUse
from sdopt.pipeline.lora_methods import stack_of
from sdopt.pipeline.lora_scales import LayerScales
from sdopt.weights.safetensors_header import TensorRef

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def fill_slots(pipeline: DiffusionPipeline, loras: Sequence[LoraUse]) -> None:
    """Make just these LoRAs active in the engines of a pipeline. Raises `UsageError` where they have no slots."""
    stack = stack_of(pipeline)
    active = {}
    for number, use in enumerate(loras):
        name = f"{number}-{Path(use.source).stem}"
        stack.load(Path(use.source), name, error_limit=ERROR_LIMIT)
        active[name] = {
            each: LayerScales(use.unet if each is ComponentName.UNET else use.text) for each in ComponentName
        }
    stack.activate(active)


def add_to_weights(
    sessions: Mapping[ComponentName, TorchSession],
    tensors: Mapping[ComponentName, Mapping[str, TensorRef]],
    loras: Sequence[LoraUse],
) -> None:
    """Add the LoRAs to the weights that torch has open, in the type that it has them in; `tensors` are the bundle's.

    That is the right value of what engines draw: W + dW, in fp32 where torch is fp32, with no rank and no slot.
    """
    layers = {name: shapes_of_layers(own) for name, own in tensors.items()}
    parameters = {name: session.parameters() for name, session in sessions.items()}
    for use in loras:
        for change in weight_changes(read_adapter_file(Path(use.source)), layers, tensors):
            strength = use.unet if change.component is ComponentName.UNET else use.text
            parameter = parameters[change.component][change.tensor]
            with torch.no_grad():
                whole = parameter.float() + strength * torch.from_numpy(change.difference).to(parameter.device)
                parameter.copy_(whole)
