"""Tensors of a single file that belong to no component: wrappers around names, and what trainers leave behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from sdopt.weights.safetensors_header import TensorRef

# Around every name: DataParallel's, Lightning's, and those of tools that saved a whole training state.
_WRAPPERS = ("module.", "state_dict.", "model_state_dict.", "sd.", "ema_model.")
_UNET = "model.diffusion_model."
_NOISE = "noise schedule"
# Names that change no picture, each with what it is. Anything else that no component uses is an error where it is read.
_KNOWN: tuple[tuple[str, str], ...] = (
    (r"^model_ema\.", "EMA copy of the UNet (--ema takes it)"),
    (r"(^|\.)(text_projection(\.weight)?|logit_scale)$", "unused half of CLIP"),
    (r"(^|\.)position_ids$", "positions that are counted today"),
    (r"^(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights)$", _NOISE),
    (r"^(denoiser\.)?(sigmas|log_sigmas)$", _NOISE),
    (r"^first_stage_model\.(loss|model_ema)\.", "training state of the VAE"),
    (r"^(loss|optimizer\w*|lr_scheduler\w*|callbacks|global_step|epoch|scaler|step)(\.|$)", "training state"),
    (r"^(v_pred|ztsnr|edm_\w+(\.\w+)?)$", "mark of a trainer"),
    (r"^(safety_checker|feature_extractor)\.", "safety checker"),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), what) for pattern, what in _KNOWN)
# Of a text encoder that has none of its own: SD's reads the hidden states before it.
_UNUSED_OF_CLIP = re.compile(r"^(text_projection(\.weight)?|logit_scale)$")


def unwrap(tensors: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """The tensors without a wrapper around their names, where taking it away shows a model."""
    if any(name.startswith(_UNET) for name in tensors):
        return tensors
    for wrapper in _WRAPPERS:
        if any(name.startswith(wrapper + _UNET) for name in tensors):
            return {name.removeprefix(wrapper): ref for name, ref in tensors.items()}
    if any(name.startswith("diffusion_model.input_blocks.") for name in tensors):
        return {_rename_bare(name): ref for name, ref in tensors.items()}
    return tensors


def _rename_bare(name: str) -> str:
    return f"model.{name}" if name.startswith("diffusion_model.") else name


def list_ignored(names: Iterable[str]) -> dict[str, int]:
    """How many tensors no component uses, by what they are."""
    found = (next((what for pattern, what in _PATTERNS if pattern.search(name)), "") for name in names)
    return dict(Counter(what for what in found if what))


def drop_unused_of_clip(tensors: Mapping[str, TensorRef], *, projected: bool) -> dict[str, TensorRef]:
    """A text encoder's tensors without those of the other half of CLIP, which some writers keep.

    Only logit_scale for a `projected` one, whose projection is part of the model.
    """
    kept = {}
    for name, ref in tensors.items():
        unused = _UNUSED_OF_CLIP.match(name)
        if not unused or (projected and name.startswith("text_projection")):
            kept[name] = ref
    return kept
