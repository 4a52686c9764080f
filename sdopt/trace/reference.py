"""torch fp32's outputs for the same inputs that an engine gets.

The reference runs on the checkpoint's own tensors, not on the bundle's copy, so a damaged copy is found too. The
engine's side is not here: exports know no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from sdopt.model.component import ComponentSpec, Config
from sdopt.networks.modules import build_network, default_dtype
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.to_torch import load_weights


def load_reference(spec: ComponentSpec, config: Config, tensors: Mapping[str, TensorRef]) -> nn.Module:
    """The network in torch, in fp32, with the checkpoint's weights."""
    with default_dtype(torch.float32), init_empty_weights(include_buffers=False):
        network = build_network(spec.name, config)
    load_weights(network, tensors, torch.float32)
    return network


def run_reference(network: nn.Module, spec: ComponentSpec, inputs: Mapping[str, Tensor], outputs: Path) -> None:
    """Run a network of `load_reference` and save what it gives, by output name, as a safetensors file."""
    arguments = [value.float() if value.is_floating_point() else value for value in inputs.values()]
    with torch.inference_mode():
        results = network(*arguments)
    named = zip(spec.outputs, results if isinstance(results, tuple) else (results,), strict=True)
    save_file({tensor.name: result.contiguous().clone() for tensor, result in named}, outputs)
