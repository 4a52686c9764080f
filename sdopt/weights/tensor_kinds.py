"""What a single file is, from its tensors' names: so that the wrong file gets an answer instead of a stack
trace."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TEXT = "a text encoder alone"
_TAESD = "a TAESD, which only previews"
# The first that some name matches is the answer: the particular before the general.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"lora_|\.lora\.|\.(hada_w1|lokr_w1|oft_|glora|diff_b?$)|\.dora_scale", "a LoRA (or LyCORIS) adapter"),
    (r"motion_modules\.|\.time_stack\.|\.temporal_transformer", "a video model or motion module"),
    (r"^(control_model\.|controlnet_|input_hint_block|.*controlnet_cond_embedding|lllite_)", "a ControlNet"),
    (r"ip_adapter|^image_proj", "an IP-Adapter"),
    (r"^(string_to_param|emb_params|clip_[lg]$|\*$|<[^>]+>$)", "a textual inversion embedding"),
    (r"joint_blocks\.\d+\.|add_q_proj", "a Stable Diffusion 3 or another multimodal transformer"),
    (r"double_blocks\.\d+\.|single_transformer_blocks\.\d+\.", "a Flux model or another one of its kind"),
    (r"clip_txt_pooled_mapper|effnet_mapper", "a Stable Cascade model"),
    (r"(^|\.)noise_augmentor|^embedder\.model\.visual", "an unCLIP model"),
    (r"(^|\.)blocks\.\d+\.(cross_attn|attn1|adaLN)|adaln_single|cap_embedder", "a diffusion transformer"),
    (r"^(adapter\.)?(body\.\d+\.(resnets|block1|in_conv)|total_downscale)", "a T2I-Adapter"),
    (r"^(taesd_|(encoder|decoder)\.layers\.\d+\.(conv|weight|bias)|\d+\.conv\.\d+\.weight$)", _TAESD),
    (r"^(320|640|768|1024|1280)\.\d+\.linear", "a hypernetwork"),
    (r"(^|\.)(vision_model\.|visual\.(conv1|transformer))", "CLIP's picture encoder"),
    (r"(^|\.)scaled_fp8$|\.scale_weight$|\.weight_scale$", "a model in scaled 8-bit numbers"),
    (r"^(params_ema|model\.\d+\.weight|body\.\d+\.rdb|RRDB)", "an upscaler"),
    (r"\.absmax$|\.quant_map$|\.scales$|\.qweight$", "a quantised model"),
    (r"^(down_blocks|mid_block|up_blocks)\.", "a UNet alone, in diffusers' layout"),
    (r"^model_ema\.", "the averaged weights of a UNet alone (EMA)"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(down|mid|up|conv_in)", "a VAE alone"),
    (r"^(text_model|transformer\.resblocks|encoder\.block|cond_stage_model|conditioner)", _TEXT),
)  # fmt: skip


def name_kind(names: Iterable[str]) -> str:
    """A few words for a file that is not a Stable Diffusion checkpoint, or "" where nothing is recognised."""
    listed = list(names)
    for pattern, kind in _KINDS:
        search = re.compile(pattern).search
        if any(search(name) for name in listed):
            return kind
    return ""


def advise(kind: str) -> str:
    """What to do with a file of that kind."""
    if kind == "a VAE alone":
        return "give the model as SOURCE, and this file with --vae"
    if "adapter" in kind.lower() or "ControlNet" in kind or "embedding" in kind:
        return "it changes a model and is not one: give the model itself as SOURCE"
    if "a UNet alone" in kind or kind == _TEXT:
        return "give the whole model: a diffusers folder, or a file with UNet, VAE and text encoder"
    return "sdopt reads SD 1.x, SD 2.x, SDXL and the SDXL refiner"
