"""Which kernel computes torch's attention: one of torch's own, or that of a package, through diffusers' dispatcher.

No kernel takes every layer: the VAE's one head of 512 numbers is too wide for most, and packages compute in 16 bits on
a GPU alone. A layer that the kernel does not take is computed by the one that torch would choose.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdopt.errors import BackendError, MissingDependency

_OWN = {
    "math": (SDPBackend.MATH,),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}
# diffusers' name of the kernel, the module that must be there, and the widest head that it takes.
_PACKAGES = {
    "flash-attn": ("flash", "flash_attn", 256),
    "sage": ("sage", "sageattention", 128),
    "xformers": ("xformers", "xformers", 256),
}


def prefer_kernel(attention: str) -> contextlib.AbstractContextManager[object]:
    """Context in which torch takes this kernel of its own for every layer that it fits, and else the next that does."""
    if attention not in _OWN:
        return contextlib.nullcontext()
    return sdpa_kernel(list(_OWN[attention]), set_priority=True)


def use_package(network: nn.Module, attention: str, dtype: torch.dtype, device: torch.device) -> None:
    """Let a package compute the attention layers of a UNet that it fits; other names and networks change nothing.

    Raises `MissingDependency` where the package is not installed, `BackendError` where it takes no layer of a UNet.
    """
    from diffusers import UNet2DConditionModel

    unet = getattr(network, "network", None)
    if attention not in _PACKAGES or not isinstance(unet, UNet2DConditionModel):
        return
    kernel, module, widest = _PACKAGES[attention]
    if importlib.util.find_spec(module) is None:
        raise MissingDependency(f"{attention} is not installed", hint=f"pip install {attention}")
    if device.type != "cuda" or dtype is torch.float32:
        raise BackendError(f"{attention} computes attention in 16 bits on a GPU", hint="measure it in fp16 on a GPU")
    if not dispatch_attention(unet, kernel, widest):
        raise BackendError(f"{attention} takes heads of up to {widest} numbers, and every head of the UNet is wider")


def dispatch_attention(unet: nn.Module, kernel: str, widest: int) -> int:
    """Send the attention layers with heads of up to `widest` numbers to diffusers' kernel of that name. Returns how
    many.
    """
    from diffusers.models.attention_processor import Attention

    layers = [part for part in unet.modules() if isinstance(part, Attention) and _is_plain(part)]
    chosen = [layer for layer in layers if layer.inner_dim // layer.heads <= widest]
    for layer in chosen:
        layer.set_processor(_Dispatched(kernel))
    return len(chosen)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a transformer block's: without norms and a residual of its own, as in every UNet that is read."""
    extras = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    return all(extra is None for extra in extras) and not layer.residual_connection


class _Dispatched:
    """A processor of diffusers' `Attention` for plain layers. Its own calls torch, and never the dispatcher."""

    def __init__(self, kernel: str) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        self._kernel = AttentionBackendName(kernel)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """Tokens [B,T,D] and what they look at [B,S,D'] (themselves where it is None) -> [B,T,D]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        query, key, value = (states.unflatten(-1, (attn.heads, -1)) for states in projected)
        mixed = dispatch_attention_fn(query, key, value, backend=self._kernel)
        output = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        scaled: Tensor = output / attn.rescale_output_factor
        return scaled
