"""Adapter files as their writers make them, for small random networks, and what diffusers and PEFT read in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdopt.adapters.adapter import Adapter
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.weights.safetensors_header import TensorRef, read_header
from tests.checkpoints import small_recipe, unet_to_original

UNET, TEXT, TEXT_2 = ComponentName.UNET, ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
Layers = dict[ComponentName, dict[str, tuple[int, ...]]]
Deltas = dict[ComponentName, dict[str, Tensor]]
Name = Callable[[ComponentName, str], str]


@dataclass
class Networks:
    """fp32 networks of one family, as a pipeline holds them."""

    modules: dict[ComponentName, nn.Module]
    unet_config: dict[str, Any]
    pipe: Any

    @property
    def layers(self) -> Layers:
        """As a bundle's weight files have them."""
        return {
            component: {
                key.removesuffix(".weight"): tuple(value.shape)
                for key, value in module.state_dict().items() if key.endswith(".weight")
            }
            for component, module in self.modules.items()
        }  # fmt: skip

    def weight(self, component: ComponentName, layer: str) -> Tensor:
        return self.modules[component].state_dict()[f"{layer}.weight"].clone()

    def write_base(self, folder: Path) -> dict[ComponentName, dict[str, TensorRef]]:
        base = {}
        for component, module in self.modules.items():
            path = folder / f"{component}.safetensors"
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
            base[component] = dict(read_header(path).tensors)
        return base

    def original_name(self, layer: str) -> str:
        """A UNet's layer by the blocks of the original code."""
        state = {f"{key}.weight": torch.zeros(()) for key in self.layers[UNET]}
        names = unet_to_original(state, self.unet_config)
        return dict(zip(state, names, strict=True))[f"{layer}.weight"].removesuffix(".weight")


def make_networks(family: Family) -> Networks:
    recipe = small_recipe(family)
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**recipe.unet)
    modules: dict[ComponentName, nn.Module] = {UNET: unet}
    for name, config in recipe.text.items():
        kind = CLIPTextModelWithProjection if name == TEXT_2 else CLIPTextModel
        modules[ComponentName(name)] = kind(CLIPTextConfig(**config))
    parts = {"vae": None, "scheduler": None, "unet": unet, "text_encoder": modules[TEXT], "tokenizer": None}
    if family is Family.SDXL:
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=modules[TEXT_2], tokenizer_2=None)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )  # fmt: skip
    return Networks(modules, recipe.unet, pipe)


@dataclass(frozen=True)
class Pair:
    """down [rank, in(, height, width)], up [out, rank(, 1, 1)], and the alpha that a file may say."""

    down: Tensor
    up: Tensor
    alpha: float

    def delta(self, scale: float | None = None) -> Tensor:
        rank = self.down.shape[0]
        whole = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return (whole * (self.alpha / rank if scale is None else scale)).reshape(len(self.up), *self.down.shape[1:])


Pairs = dict[ComponentName, dict[str, Pair]]


def is_attention(layer: str) -> bool:
    return layer.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"))


def is_transformer(layer: str) -> bool:
    return is_attention(layer) or ".ff.net" in layer or ".mlp." in layer or layer.endswith(("proj_in", "proj_out"))


def is_matrix(shape: tuple[int, ...], layer: str) -> bool:
    return len(shape) > 1 and "embedding." not in layer and "embeddings." not in layer


def make_pairs(networks: Networks, pick: Callable[[str], bool], *, rank: int = 4, alpha: float = 2.0) -> Pairs:
    """Random ones for the layers that `pick` takes. Ranks differ from layer to layer: `rank` and one more by turns."""
    torch.manual_seed(2)
    pairs: Pairs = {}
    for component, layers in networks.layers.items():
        for at, (layer, shape) in enumerate(layers.items()):
            if pick(layer) and is_matrix(shape, layer):
                r, ones = rank + at % 2, [1] * (len(shape) - 2)
                pair = Pair(torch.randn(r, *shape[1:]) * 0.1, torch.randn(shape[0], r, *ones) * 0.1, alpha)
                pairs.setdefault(component, {})[layer] = pair
    return pairs


def kohya_name(component: ComponentName, layer: str, *, xl: bool = False) -> str:
    if component is UNET:
        return f"lora_unet_{layer.replace('.', '_')}"
    start = {TEXT: "lora_te1" if xl else "lora_te", TEXT_2: "lora_te2"}[component]
    return f"{start}_{_text_model(layer).replace('.', '_')}"


def dotted_name(component: ComponentName, layer: str) -> str:
    return f"{component}.{layer if component is UNET else _text_model(layer)}"


def _text_model(layer: str) -> str:
    """transformers has the word in CLIPTextModelWithProjection, and no longer in CLIPTextModel; files always have."""
    return layer if layer == "text_projection" else f"text_model.{layer.removeprefix('text_model.')}"


def write_pairs(
    path: Path,
    pairs: Pairs,
    name: Name,
    *,
    down: str = "lora_down.weight",
    up: str = "lora_up.weight",
    alpha: bool = True,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    state: dict[str, Tensor] = {}
    for component, layers in pairs.items():
        for layer, pair in layers.items():
            stem = name(component, layer)
            state[f"{stem}.{down}".replace("._", "_")] = pair.down.to(dtype)
            state[f"{stem}.{up}".replace("._", "_")] = pair.up.to(dtype)
            if alpha:
                state[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=dtype)
    return write_state(path, state, metadata)


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(tensors, path, None if metadata is None else dict(metadata))
    return path


def read_with_diffusers(networks: Networks, path: Path) -> Deltas:
    """The difference of each layer that diffusers and PEFT make of a file, DoRA as well, on the networks' weights."""
    from peft.tuners.lora import LoraLayer

    found: Deltas = {}
    try:
        networks.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
        for component, module in networks.modules.items():
            for layer, part in module.named_modules():
                if isinstance(part, LoraLayer) and "a" in part.lora_A:
                    before = part.base_layer.weight.detach().clone()
                    if part.use_dora.get("a"):
                        part.merge(adapter_names=["a"])
                        delta = part.base_layer.weight.detach() - before
                        part.base_layer.weight.data.copy_(before)
                        part.merged_adapters.clear()
                    else:
                        delta = part.get_delta_weight("a").detach()
                    found.setdefault(component, {})[layer] = delta
    finally:
        networks.pipe.unload_lora_weights()
    return found


def deltas_of(adapter: Adapter) -> Deltas:
    return {
        component: {
            layer: torch.from_numpy(
                np.tensordot(pair.up.astype(np.float64), pair.down.astype(np.float64), axes=(1, 0))
            ) for layer, pair in layers.items()
        } for component, layers in adapter.layers.items()
    }  # fmt: skip


def require_same(found: Deltas, wanted: Mapping[ComponentName, Mapping[str, Tensor]], limit: float = 2e-6) -> None:
    """The same layers, each with the same difference, relative to its own size."""
    for component in found.keys() | wanted.keys():
        ours, theirs = found.get(component, {}), wanted.get(component, {})
        assert ours.keys() == theirs.keys(), component
        for layer, delta in ours.items():
            right = theirs[layer].double().reshape(delta.shape)
            assert torch.linalg.norm(right) > 0, layer
            error = float(torch.linalg.norm(delta.double() - right) / torch.linalg.norm(right))
            assert error <= limit, f"{component} {layer}: {error:.1e}"
