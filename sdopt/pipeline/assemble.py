"""Sessions and the files of a bundle to a diffusers pipeline. Knows no backend: the sessions are already
open.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from sdopt.backends.protocol import Session
from sdopt.backends.slotted_session import find_slotted
from sdopt.bundle.damage import require_intact, require_pipeline
from sdopt.bundle.manifest import BundleManifest, read_config, read_manifest
from sdopt.errors import ArtifactError, CheckpointError, UnsafeInputError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.model.samplers import SchedulerName
from sdopt.model.task import PIPELINE_CLASSES, Task
from sdopt.pipeline.guarded_call import guarded
from sdopt.pipeline.lora_methods import with_loras
from sdopt.pipeline.lora_stack import LoraStack
from sdopt.pipeline.modules.engine_text_encoder import EngineTextEncoder
from sdopt.pipeline.modules.engine_unet import EngineUNet
from sdopt.pipeline.modules.engine_vae import EngineVAE
from sdopt.pipeline.opened import OpenedBundle
from sdopt.pipeline.prompt import PromptTokenizer, load_tokenizer
from sdopt.pipeline.prompt_encoding import reading_prompts
from sdopt.pipeline.schedulers import make_scheduler
from sdopt.pipeline.word_methods import with_words
from sdopt.pipeline.word_stack import WordStack
from sdopt.weights.safetensors_header import read_header
from sdopt.weights.to_torch import read_tensor

_SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"


def read_scheduler(folder: Path, name: SchedulerName | None) -> diffusers.SchedulerMixin:
    """The scheduler that a bundle draws with, without opening it; None is the checkpoint's own.

    Raises `ArtifactError` for a folder that is not a bundle of a whole pipeline or whose scheduler was changed,
    `UsageError` where the scheduler does not fit.
    """
    manifest = read_manifest(folder)
    require_pipeline(folder, manifest)
    name_in_bundle = _SCHEDULER_CONFIG.as_posix()
    require_intact(folder, {file: record for file, record in manifest.files.items() if file == name_in_bundle})
    config = _read_table(folder / _SCHEDULER_CONFIG)
    return make_scheduler(name, config, family=manifest.family, prediction=manifest.prediction)


def assemble_pipeline(
    folder: Path,
    manifest: BundleManifest,
    sessions: Mapping[ComponentName, Session],
    *,
    scheduler: SchedulerName | str | None = None,
) -> diffusers.DiffusionPipeline:
    """A pipeline of the family's own diffusers class over open sessions; it draws at the bundle's size by
    default.

    Raises `ArtifactError` where a component or a file is missing or damaged, `UsageError` for a scheduler
    that does not fit the checkpoint.
    """
    require_pipeline(folder, manifest, sessions)
    bundle = OpenedBundle(folder, manifest, _read_table(folder / _SCHEDULER_CONFIG))
    vae = EngineVAE(
        sessions[ComponentName.VAE_DECODER],
        sessions.get(ComponentName.VAE_ENCODER),
        read_config(folder, ComponentName.VAE_DECODER),
    )
    parts = {
        "vae": vae,
        "unet": _make_unet(folder, bundle, sessions),
        "scheduler": make_scheduler(
            scheduler, bundle.scheduler_config, family=manifest.family, prediction=manifest.prediction
        ),
        "text_encoder": _make_text_encoder(folder, sessions, ComponentName.TEXT_ENCODER),
        "tokenizer": _load_tokenizer(folder / "tokenizer", manifest),
    }
    if manifest.family.is_xl:
        parts["text_encoder_2"] = _make_text_encoder(folder, sessions, ComponentName.TEXT_ENCODER_2)
        parts["tokenizer_2"] = _load_tokenizer(folder / "tokenizer_2", manifest)
    parts["unet"].words = _make_words(folder, manifest, sessions, parts)
    return _pipeline_class(manifest)(**parts, **_flags(manifest, _read_table(folder / "model_index.json")))


def _make_unet(folder: Path, bundle: OpenedBundle, sessions: Mapping[ComponentName, Session]) -> EngineUNet:
    session = sessions[ComponentName.UNET]
    factor = bundle.manifest.require_pixels_per_latent()
    # Always a number: the image-to-image pipelines compare it with 64 and fail on a pair.
    side = bundle.manifest.profile.height_px.opt // factor
    unet = EngineUNet(session, read_config(folder, ComponentName.UNET), sample_size=side, pixels_per_latent=factor)
    unet.bundle = bundle
    slotted = {name: found for name, opened in sessions.items() if (found := find_slotted(opened)) is not None}
    loras = {name: session for name, session in slotted.items() if session.slots.slots}
    unet.loras = LoraStack(folder, bundle.manifest, loras)
    return unet


def _make_words(
    folder: Path, manifest: BundleManifest, sessions: Mapping[ComponentName, Session], parts: Mapping[str, Any]
) -> WordStack:
    encoders = [name for name in sessions if name.is_text_encoder]
    slotted = {name: found for name in encoders if (found := find_slotted(sessions[name])) is not None}
    every = {name: parts[name.value.replace("text_encoder", "tokenizer")] for name in encoders}
    return WordStack(folder, manifest, slotted, {name: each for name, each in every.items() if each is not None})


def _make_text_encoder(
    folder: Path, sessions: Mapping[ComponentName, Session], name: ComponentName
) -> EngineTextEncoder | None:
    if name not in sessions:
        return None
    path = folder / name / WEIGHTS_NAME
    try:
        norm = {
            key.rsplit(".", 1)[1]: ref for key, ref in read_header(path).tensors.items() if "final_layer_norm." in key
        }
        weight, bias = read_tensor(norm["weight"]), read_tensor(norm["bias"])
    except (CheckpointError, UnsafeInputError, KeyError) as error:
        raise ArtifactError(
            f"cannot read the final layer norm from {path}: {error}",
            hint="sdopt check names every damaged file",
        ) from error
    return EngineTextEncoder(sessions[name], read_config(folder, name), (weight, bias))


def _load_tokenizer(folder: Path, manifest: BundleManifest) -> PromptTokenizer | None:
    return load_tokenizer(folder, manifest.profile.chunk_counts[-1]) if folder.is_dir() else None


def _flags(manifest: BundleManifest, index: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the pipeline's class that a checkpoint brings; the defaults are those of the published
    models.
    """
    if not manifest.family.is_xl:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    refiner = manifest.family is Family.SDXL_REFINER
    flags = {
        "force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", not refiner)),
        # A watermark would make the pictures differ from torch's wherever its library happens to be
        # installed.
        "add_watermarker": False,
    }
    if manifest.own_task is not Task.TEXT_TO_IMAGE:
        flags["requires_aesthetics_score"] = bool(index.get("requires_aesthetics_score", refiner))
    return flags


def _pipeline_class(manifest: BundleManifest) -> Any:
    return with_words(with_loras(guarded(_sized_class(manifest))))


def _sized_class(manifest: BundleManifest) -> Any:
    kind = reading_prompts(getattr(diffusers, PIPELINE_CLASSES[manifest.family][manifest.own_task]))
    height_px, width_px = manifest.profile.height_px.opt, manifest.profile.width_px.opt
    # The refiner's has no size of its own: it draws on the picture that it is given.
    if height_px == width_px or not {"height", "width"} <= inspect.signature(kind.__call__).parameters.keys():
        return kind
    return _with_default_size(kind, height_px, width_px)


def _with_default_size(kind: Any, height_px: int, width_px: int) -> Any:
    """The class with another default size: diffusers knows only square ones.

    It keeps its name, by which `AutoPipelineFor….from_pipe` finds its relatives.
    """
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs)
        for side, default_px in (("height", height_px), ("width", width_px)):
            bound.arguments[side] = bound.arguments.get(side) or default_px
        return kind.__call__(*bound.args, **bound.kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", hint="sdopt check names every damaged file") from error
    if not isinstance(table, dict):
        raise ArtifactError(f"{path} does not hold a table")
    return table
