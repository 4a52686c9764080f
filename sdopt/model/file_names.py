"""How the files of a bundle are called: each name is spelled here and nowhere else."""

from __future__ import annotations

MANIFEST_NAME = "bundle.json"
GRAPH_NAME = "model.onnx"
SLOTS_GRAPH_NAME = "model-slots.onnx"
"""The same network with LoRA slots, over the same weight file."""
WEIGHTS_NAME = "weights.safetensors"
"""The graph's external data: a component's weights, once, readable by every tool."""
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
