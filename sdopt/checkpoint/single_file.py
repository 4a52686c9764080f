"""One file in the original (CompVis/Stability) layout -> `Checkpoint`, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.bundle.records import SourceRecord
from sdopt.checkpoint.checkpoint import Checkpoint, Choice, ComponentSource
from sdopt.checkpoint.folder import open_vae_folder, read_tasks, split_vae
from sdopt.checkpoint.hub import fetch_vae, is_hub_id
from sdopt.checkpoint.ignored import drop_unused_of_clip, list_ignored, unwrap
from sdopt.checkpoint.infer import SCALING, infer_family, infer_text_encoder, infer_unet, infer_vae, sample_size
from sdopt.checkpoint.ldm import map_unet, map_vae
from sdopt.checkpoint.match import match_component
from sdopt.checkpoint.openclip import map_openclip
from sdopt.checkpoint.prediction_signs import find_signs, has_zero_snr, settle_prediction, usual_prediction
from sdopt.checkpoint.scheduler_config import make_scheduler
from sdopt.checkpoint.tokenizer import END_OF_TEXT, EXCLAMATION, VOCABULARY, write_clip_tokenizer
from sdopt.checkpoint.weight_files import open_tensors_file
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config, vae_factor
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.weights.safetensors_header import TensorRef, quantised_error
from sdopt.weights.tensor_kinds import advise, name_kind

Tensors = Mapping[str, TensorRef]
Components = dict[ComponentName, ComponentSource]

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_EMA = "model_ema."
_VAE_HINT = "--vae takes a diffusers VAE folder, a single file, or a Hugging Face id"
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")
# Parts of the VAE's training that some files still carry.
_NOT_VAE = ("loss.", "model_ema.")
_OPTIONS: Mapping[Family, Mapping[str, Any]] = {
    Family.SD1: {"requires_safety_checker": False},
    Family.SD2: {"requires_safety_checker": False},
    Family.SDXL: {"force_zeros_for_empty_prompt": True},
    Family.SDXL_REFINER: {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}


@dataclass(frozen=True)
class _EncoderPlace:
    """Where a family keeps a text encoder; CLIP by transformers' names, or OpenCLIP by its own."""

    name: ComponentName
    prefix: str
    openclip: bool = False
    projected: bool = False


_FIRST, _SECOND = ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
_XL_FIRST = "conditioner.embedders.0.transformer."
_PLACES: Mapping[Family, tuple[_EncoderPlace, ...]] = {
    Family.SD1: (_EncoderPlace(_FIRST, "cond_stage_model.transformer."),),
    Family.SD2: (_EncoderPlace(_FIRST, "cond_stage_model.model.", openclip=True),),
    Family.SDXL: (
        _EncoderPlace(_FIRST, _XL_FIRST),
        _EncoderPlace(_SECOND, "conditioner.embedders.1.model.", openclip=True, projected=True),
    ),
    Family.SDXL_REFINER: (_EncoderPlace(_SECOND, "conditioner.embedders.0.model.", openclip=True, projected=True),),
}


def open_single_file(path: Path, source: SourceRecord, choice: Choice) -> Checkpoint:
    """Read a whole model from one file. Raises `CheckpointError` that names what the file is instead, or lacks."""
    file, where = open_tensors_file(path), str(path)
    tensors = unwrap(file.tensors)
    # ComfyUI's marks of weights in 8 bits with a scale beside each.
    if scale := next((key for key in tensors if key.endswith(_SCALES)), None):
        raise quantised_error(where, scale, "a scale of 8-bit weights")
    bare, layout = map_unet(_select_unet(tensors, where, ema=choice.ema), where)
    family = infer_family(bare, first_encoder=any(key.startswith(_XL_FIRST) for key in tensors), where=where)
    signs = [] if choice.prediction else find_signs(tensors, file.metadata, path)
    prediction = settle_prediction(signs, choice.prediction, where) or usual_prediction(family)
    components = _open_encoders(tensors, family, where)
    second = components.get(_SECOND)
    pooled = int(second.config["projection_dim"]) if second else None
    config = infer_unet(bare, layout, family, pooled, where)
    config["sample_size"] = sample_size(family, prediction)
    components[ComponentName.UNET] = match_component(ComponentName.UNET, config, bare, where=where)
    if not choice.vae:
        components.update(_open_own_vae(tensors, family, where))
    else:
        own = _read_vae_config(tensors, family, where)
        components.update(open_vae(choice.vae, family, offline=choice.offline))
        check_vae_fits(components, SCALING[family], None if own is None else vae_factor(own), choice.vae)
    return Checkpoint(
        source=source.model_copy(update={"licence": file.metadata.get("modelspec.license", "")}),
        family=family,
        prediction=prediction,
        tasks=read_tasks(components, family, where),
        components={name: components[name] for name in ComponentName if name in components},
        scheduler=make_scheduler(family, prediction, zero_snr=has_zero_snr(tensors, file.metadata)),
        tokenizers=_write_tokenizers(components, family, where),
        pipeline_options=_OPTIONS[family],
        ignored=list_ignored(tensors),
    )


def _strip(tensors: Tensors, prefix: str) -> dict[str, TensorRef]:
    return {key.removeprefix(prefix): ref for key, ref in tensors.items() if key.startswith(prefix)}


def _select_unet(tensors: Tensors, where: str, *, ema: bool) -> dict[str, TensorRef]:
    unet = _strip(tensors, _UNET)
    if "input_blocks.0.0.weight" in unet:
        return _take_ema(unet, tensors, where) if ema else unet
    kind = name_kind(tensors)
    if kind:
        stored = " (in fp8)" if any(ref.dtype is DType.FP8 for ref in tensors.values()) else ""
        raise CheckpointError(f"{where} is {kind}{stored}, and not a Stable Diffusion checkpoint", hint=advise(kind))
    some = f" (it has {', '.join(sorted(tensors)[:3])} …)" if tensors else ": it has no tensors"
    raise CheckpointError(
        f"{where} has no UNet of Stable Diffusion: no {_UNET}input_blocks.0.0.weight{some}",
        hint=advise(""),
    )


def _take_ema(unet: Tensors, tensors: Tensors, where: str) -> dict[str, TensorRef]:
    """The averaged copy of each of the UNet's tensors, which CompVis's trainer saves under a name without dots."""
    places = {key: _EMA + f"diffusion_model.{key}".replace(".", "") for key in unet}
    missing = [key for key, place in places.items() if place not in tensors]
    if missing:
        raise CheckpointError(
            f"{where} has no EMA copy of {'its UNet' if len(missing) == len(unet) else missing[0]}",
            hint="convert it without --ema",
        )
    return {key: tensors[place] for key, place in places.items()}


def _open_encoders(tensors: Tensors, family: Family, where: str) -> Components:
    found: Components = {}
    for place in _PLACES[family]:
        text = _strip(tensors, place.prefix)
        if not text:
            raise CheckpointError(
                f"{where} lacks the text encoder that {family} needs: no tensor under {place.prefix}",
                hint="take the full file of the model: pruned ones may hold the UNet alone",
            )
        if place.openclip:
            text = map_openclip(text, projected=place.projected, where=where)
        # transformers' prefix comes and goes with its versions and with who trained the model.
        named = {key.removeprefix("text_model."): ref for key, ref in text.items()}
        plain = drop_unused_of_clip(named, projected=place.projected)
        config = infer_text_encoder(plain, openclip=place.openclip, projected=place.projected, where=where)
        found[place.name] = match_component(place.name, config, plain, where=where)
    return found


def _own_vae(tensors: Tensors) -> dict[str, TensorRef]:
    return {key: ref for key, ref in _strip(tensors, _VAE).items() if not key.startswith(_NOT_VAE)}


def _read_vae_config(tensors: Tensors, family: Family, where: str) -> Config | None:
    """The config of the VAE that the file holds, though another is wanted; None where it holds none."""
    vae = _own_vae(tensors)
    return infer_vae(map_vae(vae), family, where) if vae else None


def _open_own_vae(tensors: Tensors, family: Family, where: str) -> Components:
    vae = _own_vae(tensors)
    if not vae:
        raise CheckpointError(
            f"{where} has no VAE: no tensor under {_VAE}",
            hint="give one with --vae: a diffusers VAE folder or a single file",
        )
    return _read_vae(vae, family, where)


def _read_vae(tensors: Tensors, family: Family, where: str) -> Components:
    named = map_vae(tensors)
    return split_vae(infer_vae(named, family, where), named, where=where)


def open_vae(vae: str, family: Family, *, offline: bool = False) -> Components:
    """Decoder and encoder of another VAE: a diffusers VAE folder, a whole model's folder, a single file, or a Hugging
    Face id of one of the first two.

    A single file has no config: its metadata may name another architecture, and else its scaling factor is taken to be
    that of the family. Raises `CheckpointError`.
    """
    path = Path(vae).expanduser()
    if not path.exists() and is_hub_id(vae):
        path = fetch_vae(vae, offline=offline)
    path = path.resolve()
    if path.is_dir():
        inner = path / "vae"
        if (path / "model_index.json").is_file() and not inner.is_dir():
            raise CheckpointError(f"{vae} is a model without vae/, and not a VAE", hint=_VAE_HINT)
        return open_vae_folder(inner if not (path / "config.json").is_file() and inner.is_dir() else path)
    if not path.is_file():
        raise CheckpointError(f"there is no VAE at {vae}", hint=_VAE_HINT)
    file = open_tensors_file(path)
    _check_architecture(file.metadata, family, vae)
    tensors = unwrap(file.tensors)
    inside = {key: ref for key, ref in (_strip(tensors, _VAE) or tensors).items() if not key.startswith(_NOT_VAE)}
    if not {"decoder.conv_in.weight", "encoder.conv_in.weight"} <= inside.keys():
        kind = name_kind(tensors)
        raise CheckpointError(
            f"{vae} is {kind or 'a file without a VAE'}, and not a VAE with encoder and decoder",
            hint=_VAE_HINT,
        )
    return _read_vae(inside, family, vae)


def _check_architecture(metadata: Mapping[str, str], family: Family, vae: str) -> None:
    """Refuse a VAE whose metadata say that it is another family's: SD's and SDXL's have the same tensors."""
    said = metadata.get("modelspec.architecture", "").lower()
    of_xl = "xl" in said
    if said.startswith("stable-diffusion") and of_xl != family.is_xl:
        raise CheckpointError(
            f"the VAE {vae} says that it is of {said}, and the model is {family}",
            hint="a VAE must be of the same family as the model",
        )


def check_vae_fits(components: Components, scaling: float, pixels_per_latent: int | None, vae: str) -> None:
    """Refuse a VAE whose latents the UNet was not trained on: other channels, another scale, shift or size.

    `scaling` and `pixels_per_latent` are what the model was trained on; the latter is None where it has no VAE of its
    own to tell it. Raises `CheckpointError`.
    """
    config, unet = components[ComponentName.VAE_DECODER].config, components[ComponentName.UNET].config
    pixels = vae_factor(config)
    found: tuple[tuple[str, Any, Any], ...] = (
        ("gives latents of {} channels", int(config["latent_channels"]), int(unet["out_channels"])),
        ("has one latent for {} pixels a side", pixels, pixels_per_latent or pixels),
        ("shifts its latents by {}", config.get("shift_factor") or 0.0, 0.0),
        ("scales its latents by {}", float(config["scaling_factor"]), scaling),
    )
    for text, is_, wanted in found:
        if abs(is_ - wanted) > 1e-6 * max(1.0, abs(wanted)):
            raise CheckpointError(
                f"the VAE {vae} {text.format(is_)}, and the model was trained on {wanted}",
                hint="a VAE must be of the same family as the model",
            )


def _write_tokenizers(components: Components, family: Family, where: str) -> dict[str, Path]:
    tokenizers = {}
    for place in _PLACES[family]:
        vocabulary = components[place.name].config["vocab_size"]
        if vocabulary != VOCABULARY:
            raise CheckpointError(
                f"{where}: its text encoder knows {vocabulary} tokens, and CLIP's tokenizer has {VOCABULARY}",
                hint="give the model as a diffusers folder, which holds its tokenizer",
            )
        pad_token = EXCLAMATION if place.openclip else END_OF_TEXT
        tokenizers[place.name.replace("text_encoder", "tokenizer")] = write_clip_tokenizer(pad_token)
    return tokenizers
