"""A diffusers folder (`model_index.json`, `unet/`, `vae/` …) -> `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.bundle.records import SourceRecord
from sdopt.checkpoint.checkpoint import Checkpoint, Choice, ComponentSource
from sdopt.checkpoint.ignored import drop_unused_of_clip
from sdopt.checkpoint.match import match_component
from sdopt.checkpoint.other_things import name_exported, name_folder
from sdopt.checkpoint.prediction_signs import Sign, settle_prediction
from sdopt.checkpoint.scheduler_class import require_known_scheduler
from sdopt.checkpoint.scheduler_config import with_prediction
from sdopt.checkpoint.scheduler_values import require_usable_scheduler
from sdopt.checkpoint.tokenizer_files import require_tokenizer
from sdopt.checkpoint.vae_values import require_latent_scale
from sdopt.checkpoint.weight_files import INDEX_NAME, open_component_weights, read_json
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config
from sdopt.model.family import Family, Prediction, parse_prediction
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.task import Task, find_tasks
from sdopt.weights.safetensors_header import TensorRef

_AGAIN = "download the whole model again"
_PIPELINES = re.compile(
    r"^(StableDiffusion|LatentConsistencyModel)(?!3|InstructPix2Pix|Upscale|LatentUpscale|Depth2Img|Cascade)"
)
# diffusers' own pipelines of other families; a class that it does not know is judged by its parts.
_OTHERS = re.compile(
    r"InstructPix2Pix|Upscale|Depth2Img|Cascade|StableDiffusion3|Flux|Kandinsky|PixArt|AuraFlow|Wan|Hunyuan|LTX|Sana|"
    r"Lumina|Mochi|CogV|IF[A-Z]|DiT|Wuerstchen|UnCLIP|Unclip|Video|Audio|Chroma|Qwen|HiDream|OmniGen"
)
# What a pipeline may have besides its networks; anything else (a ControlNet, a prior) would be lost in silence.
_PARTS = (
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "safety_checker",
    "feature_extractor", "image_encoder",
)  # fmt: skip
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_LICENCE = re.compile(r"^licen[cs]e:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)


def open_folder(folder: Path, source: SourceRecord, choice: Choice) -> Checkpoint:
    """Read a pipeline that diffusers saved; `folder` is resolved, `source` says what the user gave.

    Without `vae/` it has no VAE where the choice names another. Raises `CheckpointError` that says what the folder
    lacks or what it is instead.
    """
    index = _read_index(folder, needs_vae=not choice.vae)
    unet = _find_unet(folder, ema=choice.ema)
    unet_config = _read_config(folder, unet.name, "UNet2DConditionModel")
    text = _open_text_encoders(folder, index)
    family = find_family(unet_config, text, folder)
    components = {**text}
    components[ComponentName.UNET] = match_component(
        ComponentName.UNET, unet_config, open_component_weights(unet), where=str(unet)
    )
    if (folder / "vae").is_dir():
        components.update(open_vae_folder(folder / "vae"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    require_known_scheduler(scheduler, str(folder))
    prediction = _find_prediction(scheduler, unet_config, folder, choice.prediction)
    if scheduler.get("prediction_type", Prediction.EPSILON) != prediction:
        scheduler = with_prediction(scheduler, prediction)
    require_usable_scheduler(scheduler, str(folder))
    return Checkpoint(
        source=source.model_copy(update={"licence": source.licence or read_licence(folder)}),
        family=family,
        prediction=prediction,
        tasks=read_tasks(components, family, str(folder)) if ComponentName.VAE_DECODER in components else (),
        components={name: components[name] for name in ComponentName if name in components},
        scheduler=scheduler,
        tokenizers=_find_tokenizers(folder, text),
        pipeline_options={
            key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)
        },
    )


def _find_unet(folder: Path, *, ema: bool) -> Path:
    if not ema:
        return folder / "unet"
    if not (folder / "unet_ema").is_dir():
        raise CheckpointError(f"{folder} has no EMA copy of its UNet: no unet_ema/", hint="convert it without --ema")
    return folder / "unet_ema"


def _read_index(folder: Path, *, needs_vae: bool) -> dict[str, Any]:
    if (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} is a bundle that sdopt built, and not a checkpoint",
            hint="give the checkpoint that it was built from; sdopt inspect names it",
        )
    if not (folder / INDEX_NAME).is_file():
        if named := name_folder(folder):
            raise CheckpointError(f"{folder} is {named[0]}", hint=named[1])
        raise CheckpointError(f"{folder} is not a diffusers model: it has no {INDEX_NAME}", hint=_nearby(folder))
    if exported := name_exported(folder):
        raise CheckpointError(f"{folder} is {exported[0]}", hint=exported[1])
    index = read_json(folder / INDEX_NAME)
    parts = ("unet", "vae", "scheduler") if needs_vae else ("unet", "scheduler")
    lacking = [part for part in parts if not (folder / part).is_dir()]
    pipeline = _name_pipeline(index.get("_class_name", ""))
    if not _PIPELINES.match(pipeline) and (_OTHERS.search(pipeline) or not _has_the_parts(index)):
        raise CheckpointError(
            f"{folder} is a {pipeline or 'nameless pipeline'}, not one of Stable Diffusion 1, 2 or XL",
            hint="sdopt reads SD 1.x, SD 2.x, SDXL and the SDXL refiner, and their inpainting models",
        )
    if lacking:
        hint = f"{_AGAIN}, or give another VAE with --vae" if lacking == ["vae"] else _AGAIN
        raise CheckpointError(f"{folder} lacks the folder {' and '.join(lacking)}", hint=hint)
    listed = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    extra = [key for key, value in listed.items() if any(value) and key not in _PARTS]
    if extra:
        raise CheckpointError(
            f"{folder} is a pipeline with {' and '.join(extra)}, which sdopt does not know",
            hint="give the model without it",
        )
    return index


def _name_pipeline(said: Any) -> str:
    """The class of a pipeline: its name, or the last of [module, name], as custom pipelines are saved."""
    return str(said[-1]) if isinstance(said, list) and said else str(said)


def _has_the_parts(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline of another class is made of Stable Diffusion's parts: then it draws by their pipeline."""

    def kind(part: str) -> str:
        entry = index.get(part)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""

    return (
        kind("unet") in ("UNet2DConditionModel", "")  # what its own config says is checked as well
        and kind("vae") in ("AutoencoderKL", "")
        and kind("scheduler") not in _FLOW_SCHEDULERS
        and any(kind(name) in _TEXT_CLASSES for name in ("text_encoder", "text_encoder_2"))
    )


def _nearby(folder: Path) -> str:
    """What the user may have meant by a folder that is not a model."""
    if (folder / "config.json").is_file():
        return f"it looks like one component of a model: give the folder above, {folder.absolute().parent}"
    models = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if models or files:
        return f"inside it there is {', '.join((models + files)[:5])}: give one of these"
    return f"a diffusers folder has {INDEX_NAME}, unet/, vae/, text_encoder/, tokenizer/ and scheduler/"


def _read_config(folder: Path, part: str, class_name: str) -> dict[str, Any]:
    path = folder / part / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {part}/config.json", hint=_AGAIN)
    config = read_json(path)
    if config.get("_class_name", class_name) != class_name:
        raise CheckpointError(f"{path} is of a {config['_class_name']}, and sdopt reads {class_name}")
    return config


def _open_text_encoders(folder: Path, index: Mapping[str, Any]) -> dict[ComponentName, ComponentSource]:
    found: dict[ComponentName, ComponentSource] = {}
    for name in (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2):
        if not (folder / name).is_dir():
            continue
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind not in _TEXT_CLASSES:
            raise CheckpointError(f"{folder}: {name} is a {kind}, and sdopt reads CLIP's text models")
        path = folder / name / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}/config.json", hint=_AGAIN)
        # The class of the index is what diffusers loads, whatever the config says of its origin.
        config = {**read_json(path), "architectures": [kind]}
        tensors = drop_unused_of_clip(open_component_weights(folder / name), projected=kind == _TEXT_CLASSES[1])
        found[name] = match_component(name, config, tensors, where=str(folder / name))
    if not found:
        raise CheckpointError(f"{folder} has no text encoder", hint=_AGAIN)
    return found


def find_family(unet: Config, text: Mapping[ComponentName, ComponentSource], where: object) -> Family:
    """The family by the UNet's config and by which text encoders there are."""
    if unet.get("attention_type", "default") != "default":
        raise CheckpointError(f"{where}: the UNet takes places of objects (GLIGEN), as no known family does")
    for key in ("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "num_class_embeds"):
        if unet.get(key) is not None:
            raise CheckpointError(f"{where}: the UNet has {key}={unet[key]!r}, as no known family has")
    match unet.get("addition_embed_type"):
        case "text_time":
            first, second = (ComponentName.TEXT_ENCODER in text, ComponentName.TEXT_ENCODER_2 in text)
            if not second:
                raise CheckpointError(f"{where}: a UNet of SDXL needs text_encoder_2", hint=_AGAIN)
            return Family.SDXL if first else Family.SDXL_REFINER
        case None:
            return Family.SD2 if unet.get("use_linear_projection") else Family.SD1
        case other:
            raise CheckpointError(f"{where}: the UNet has addition_embed_type={other!r}, as no known family has")


def read_tasks(components: Mapping[ComponentName, ComponentSource], family: Family, where: str) -> tuple[Task, ...]:
    """What the model can be asked for, by the channels that its UNet takes. Raises `CheckpointError` for a number of
    them that no task of sdopt's has.
    """
    channels = int(components[ComponentName.UNET].config["in_channels"])
    latent = int(components[ComponentName.VAE_DECODER].config["latent_channels"])
    if tasks := find_tasks(family, channels, latent):
        return tasks
    kinds = {
        2 * latent: "an InstructPix2Pix model",
        latent + 1: "a depth-to-image model",
        latent + 3: "an upscaler",
    }
    kind = kinds.get(channels, "no text-to-image model")
    raise CheckpointError(
        f"{where}: the UNet takes {channels} channels and the VAE gives {latent}: it is {kind}",
        hint="sdopt reads text-to-image and 9-channel inpainting models",
    )


def open_vae_folder(folder: Path) -> dict[ComponentName, ComponentSource]:
    """The two halves of the VAE in a diffusers folder."""
    config = _read_config(folder.parent, folder.name, "AutoencoderKL")
    require_latent_scale(config, str(folder))
    return split_vae(config, open_component_weights(folder), where=str(folder))


def split_vae(config: Config, tensors: Mapping[str, TensorRef], *, where: str) -> dict[ComponentName, ComponentSource]:
    """A VAE by diffusers' names -> decoder (with `post_quant_conv`) and encoder (with `quant_conv`)."""
    decoder = {key: ref for key, ref in tensors.items() if key.startswith(("decoder.", "post_quant_conv."))}
    encoder = {key: ref for key, ref in tensors.items() if key not in decoder}
    return {
        ComponentName.VAE_DECODER: match_component(ComponentName.VAE_DECODER, config, decoder, where=where),
        ComponentName.VAE_ENCODER: match_component(ComponentName.VAE_ENCODER, config, encoder, where=where),
    }


def _find_prediction(scheduler: Config, unet: Config, folder: Path, chosen: Prediction | None) -> Prediction:
    """By the scheduler's config and, where trainers write it, the UNet's; epsilon where neither says anything."""
    if chosen is not None:
        return chosen
    signs = []
    for config, where in ((scheduler, "scheduler/scheduler_config.json"), (unet, "unet/config.json")):
        if (said := config.get("prediction_type")) is None:
            continue
        prediction = parse_prediction(said) if isinstance(said, str) else None
        if prediction is None:
            raise CheckpointError(
                f"{folder}: prediction_type in {where} is {said!r}, and sdopt knows epsilon and v_prediction",
                hint="where the file is wrong, --prediction decides",
            )
        signs.append(Sign(prediction, where))
    return settle_prediction(signs, None, str(folder)) or Prediction.EPSILON


def _find_tokenizers(folder: Path, text: Mapping[ComponentName, ComponentSource]) -> dict[str, Path]:
    tokenizers = {}
    for name in text:
        part = name.replace("text_encoder", "tokenizer")
        path = folder / part
        require_tokenizer(path)
        tokenizers[part] = path
    return tokenizers


def read_licence(folder: Path) -> str:
    """The licence's name in the model card's front matter, or ""."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(64 << 10)
    if not text.startswith("---"):
        return ""
    front = text[3:].partition("\n---")[0]
    named = re.search(r"^license_name:\s*[\"']?([^\s\"'#]+)", front, re.MULTILINE)
    found = _LICENCE.search(front)
    return named[1] if named else (found[1] if found else "")
