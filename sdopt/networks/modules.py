"""Config -> torch module whose forward takes and returns tensors in the order of its `ComponentSpec`.

Knows the classes of diffusers and transformers; knows nothing of weights, files or ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config, has_projection

CONFIG_HINT = "download it again: its config.json holds values that no model of its kind has"


class TextEncoderNetwork(nn.Module):
    """CLIP's text model. `input_ids` int64 [batch, tokens] -> last state, pooled, then every state before the last."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        clip = CLIPTextConfig.from_dict({**config})
        self.projected = has_projection(config)
        self.network = (CLIPTextModelWithProjection if self.projected else CLIPTextModel)(clip)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.network(input_ids, output_hidden_states=True, return_dict=True)
        states = output.hidden_states[:-1]
        if self.projected:
            return (output.text_embeds, output.last_hidden_state, *states)
        return (output.last_hidden_state, output.pooler_output, *states)


class UNetNetwork(nn.Module):
    """The denoiser: sample [2B,C,h,w], timestep [], text states [2B,T,D], what SDXL and LCM add -> [2B,C',h,w]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.network = UNet2DConditionModel.from_config(dict(config))
        self.extra_inputs = _extra_inputs(config)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *extra: Tensor) -> Tensor:
        named = dict(zip(self.extra_inputs, extra, strict=True))
        added: dict[str, Tensor] = {}
        if "text_embeds" in named:
            # The time embedding is computed in fp32 and concatenated with this: torch promotes, ONNX's Concat does not.
            added = {"text_embeds": named["text_embeds"].float(), "time_ids": named["time_ids"].float()}
        (noise,) = self.network(
            sample, timestep, encoder_hidden_states, timestep_cond=named.get("timestep_cond"),
            added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        return noise  # type: ignore[no-any-return]


class VaeDecoderNetwork(nn.Module):
    """Latents [B,C,h,w] (already divided by the scaling factor) -> pictures in about -1..1, [B,3,H,W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.network = AutoencoderKL.from_config(dict(config))
        del self.network.encoder, self.network.quant_conv

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.network.post_quant_conv is not None:
            latent_sample = self.network.post_quant_conv(latent_sample)
        return self.network.decoder(latent_sample)  # type: ignore[no-any-return]


class VaeEncoderNetwork(nn.Module):
    """Pictures in -1..1 [B,3,H,W] -> mean and log variance of the latents, stacked: [B,2C,h,w]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.network = AutoencoderKL.from_config(dict(config))
        del self.network.decoder, self.network.post_quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        moments = self.network.encoder(sample)
        if self.network.quant_conv is not None:
            moments = self.network.quant_conv(moments)
        return moments  # type: ignore[no-any-return]


def _extra_inputs(config: Config) -> tuple[str, ...]:
    extra: tuple[str, ...] = ()
    if config.get("addition_embed_type") == "text_time":
        extra += ("text_embeds", "time_ids")
    if config.get("time_cond_proj_dim"):
        extra += ("timestep_cond",)
    return extra


def build_network(name: ComponentName, config: Config) -> nn.Module:
    """The module of a component, in eval mode, with the default dtype. Its `network` has diffusers' tensor names.

    Build it under `empty_weights()` unless the random weights are wanted. Raises `CheckpointError` for a config that
    diffusers or transformers cannot build.
    """
    builders: dict[ComponentName, Any] = {
        ComponentName.TEXT_ENCODER: TextEncoderNetwork,
        ComponentName.TEXT_ENCODER_2: TextEncoderNetwork,
        ComponentName.UNET: UNetNetwork,
        ComponentName.VAE_DECODER: VaeDecoderNetwork,
        ComponentName.VAE_ENCODER: VaeEncoderNetwork,
    }
    try:
        module: nn.Module = builders[name](config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"the config of {name} cannot be built: {said}", hint=CONFIG_HINT) from error
    return module.eval()


def count_attention_layers(module: nn.Module) -> int:
    """How many attention blocks a network has: what the graph and the engine must have too."""
    return sum(type(part).__name__ in ("Attention", "CLIPAttention") for part in module.modules())


def tensor_names(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a network made by `build_network`, as diffusers and transformers name them."""
    return {name.removeprefix("network."): tuple(value.shape) for name, value in module.state_dict().items()}


def default_dtype(dtype: torch.dtype) -> _DefaultDtype:
    """Context: modules are constructed in `dtype` (`.to` on them would fail on weights that are not there)."""
    return _DefaultDtype(dtype)


class _DefaultDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)
