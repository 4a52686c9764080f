"""What names and shapes a config asks for, from modules on torch's meta device: nothing is allocated."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config
from sdopt.networks.modules import CONFIG_HINT, build_network, tensor_names

# What transformers adds to a CLIP config and what changes neither names, nor shapes, nor numbers.
_CLIP_KEYS = (
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "pad_token_id",
    "projection_dim", "vocab_size",
)  # fmt: skip


def build_shapes(name: ComponentName, config: Config) -> tuple[Config, dict[str, tuple[int, ...]]]:
    """The config with every key that the installed libraries know, and the shapes of the tensors that it needs.

    Two configs that say the same, one with fewer keys, become equal: old files leave out what was the default. Raises
    `CheckpointError` for a config that cannot be built.
    """
    complete = _complete_clip(config) if name.is_text_encoder else _complete_diffusers(name, config)
    with torch.device("meta"):
        module = build_network(name, complete)
    return complete, dict(tensor_names(module))


def _complete_clip(config: Config) -> dict[str, Any]:
    try:
        values = CLIPTextConfig.from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers validates with classes of its own
        raise CheckpointError(
            f"the config of a text encoder cannot be read: {' '.join(str(error).split())}", hint=CONFIG_HINT
        ) from error
    return {key: values[key] for key in _CLIP_KEYS}


def _complete_diffusers(name: ComponentName, config: Config) -> dict[str, Any]:
    kind: Any = UNet2DConditionModel if name is ComponentName.UNET else AutoencoderKL
    defaults = {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    complete: dict[str, Any] = {"_class_name": kind.__name__}
    for key, default in defaults.items():
        value = config.get(key, default)
        complete[key] = list(value) if isinstance(value, tuple) else value
    return complete
