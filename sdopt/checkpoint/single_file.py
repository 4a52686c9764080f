"""One file in the original (CompVis/Stability) layout -> `Checkpoint`, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.bundle.records import SourceRecord
from sdopt.checkpoint.checkpoint import Checkpoint, ComponentSource
from sdopt.checkpoint.detect import advise, name_kind
from sdopt.checkpoint.folder import is_inpainting, open_vae_folder, split_vae
from sdopt.checkpoint.infer import infer_family, infer_text_encoder, infer_unet, infer_vae, sample_size
from sdopt.checkpoint.ldm import map_unet, map_vae
from sdopt.checkpoint.match import match_component
from sdopt.checkpoint.openclip import map_openclip
from sdopt.checkpoint.scheduler_config import find_prediction, make_scheduler
from sdopt.checkpoint.tokenizer import END_OF_TEXT, EXCLAMATION, VOCABULARY, write_clip_tokenizer
from sdopt.checkpoint.weight_files import open_tensors_file
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.weights.safetensors_header import TensorRef

Tensors = Mapping[str, TensorRef]
Components = dict[ComponentName, ComponentSource]

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
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


def open_single_file(path: Path, source: SourceRecord, *, vae: str, prediction: Prediction | None) -> Checkpoint:
    """Read a whole model from one file. Raises `CheckpointError` that names what the file is instead, or
    lacks."""
    file, where = open_tensors_file(path), str(path)
    bare, layout = map_unet(_select_unet(file.tensors, where), where)
    family = infer_family(bare, first_encoder=any(key.startswith(_XL_FIRST) for key in file.tensors), where=where)
    prediction = prediction or find_prediction(file.tensors, file.metadata, family, where)
    components = _open_encoders(file.tensors, family, where)
    second = components.get(_SECOND)
    pooled = int(second.config["projection_dim"]) if second else None
    config = infer_unet(bare, layout, family, pooled, where)
    config["sample_size"] = sample_size(family, prediction)
    components[ComponentName.UNET] = match_component(ComponentName.UNET, config, bare, where=where)
    components.update(open_vae(vae, family) if vae else _open_own_vae(file.tensors, family, where))
    return Checkpoint(
        source=source.model_copy(update={"licence": file.metadata.get("modelspec.license", "")}),
        family=family,
        prediction=prediction,
        inpainting=is_inpainting(components, where),
        components={name: components[name] for name in ComponentName if name in components},
        scheduler=make_scheduler(family, prediction, file.tensors),
        tokenizers=_write_tokenizers(components, family, where),
        pipeline_options=_OPTIONS[family],
    )


def _strip(tensors: Tensors, prefix: str) -> dict[str, TensorRef]:
    return {key.removeprefix(prefix): ref for key, ref in tensors.items() if key.startswith(prefix)}


def _select_unet(tensors: Tensors, where: str) -> dict[str, TensorRef]:
    unet = _strip(tensors, _UNET)
    if "input_blocks.0.0.weight" in unet:
        return unet
    kind = name_kind(tensors)
    if kind:
        raise CheckpointError(f"{where} is {kind}, no Stable Diffusion checkpoint", hint=advise(kind))
    some = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(
        f"{where} has no UNet of Stable Diffusion: no {_UNET}input_blocks.0.0.weight (it has {some} …)",
        hint=advise(""),
    )


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
        plain = {key.removeprefix("text_model."): ref for key, ref in text.items()}
        config = infer_text_encoder(plain, openclip=place.openclip, projected=place.projected, where=where)
        found[place.name] = match_component(place.name, config, plain, where=where)
    return found


def _open_own_vae(tensors: Tensors, family: Family, where: str) -> Components:
    vae = {key: ref for key, ref in _strip(tensors, _VAE).items() if not key.startswith(_NOT_VAE)}
    if not vae:
        raise CheckpointError(
            f"{where} has no VAE: no tensor under {_VAE}",
            hint="give one with --vae: a diffusers VAE folder or a single file",
        )
    return _read_vae(vae, family, where)


def _read_vae(tensors: Tensors, family: Family, where: str) -> Components:
    named = map_vae(tensors)
    return split_vae(infer_vae(named, family, where), named, where=where)


def open_vae(vae: str, family: Family) -> Components:
    """Decoder and encoder of another VAE: a diffusers VAE folder, a whole model's folder, or a single file.

    A single file's scaling factor is the family's. Raises `CheckpointError`.
    """
    path = Path(vae).expanduser().resolve()
    if path.is_dir():
        inner = path / "vae"
        return open_vae_folder(inner if not (path / "config.json").is_file() and inner.is_dir() else path)
    if not path.is_file():
        raise CheckpointError(f"there is no VAE at {vae}", hint="--vae takes a diffusers VAE folder or a single file")
    tensors = open_tensors_file(path).tensors
    inside = {key: ref for key, ref in (_strip(tensors, _VAE) or tensors).items() if not key.startswith(_NOT_VAE)}
    if not {"decoder.conv_in.weight", "encoder.conv_in.weight"} <= inside.keys():
        kind = name_kind(tensors)
        raise CheckpointError(
            f"{vae} is {kind or 'no file with a VAE'}, no VAE with encoder and decoder",
            hint="--vae takes a diffusers VAE folder or a single file",
        )
    return _read_vae(inside, family, vae)


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
