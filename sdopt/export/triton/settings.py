"""`pipeline.json`: all that the pipeline model in Triton has to know of a checkpoint.

What diffusers knows how to compute (the noise schedule, the tokenizer) is computed here and written as numbers and
files, so that nothing of it is needed in Triton.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.bundle.again import variant_command
from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.errors import ArtifactError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType
from sdopt.model.samplers import SchedulerName, parse_scheduler
from sdopt.model.shape import CHUNK_TOKENS, Extent
from sdopt.model.task import Task
from sdopt.pipeline.schedulers import make_scheduler
from sdopt.weights.dtypes import DTYPES

_KINDS = {SchedulerName.EULER: "EulerDiscreteScheduler", SchedulerName.DDIM: "DDIMScheduler"}
# Not in numpy's schedules: each makes other steps of the same class.
_SPECIAL = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding", "clip_sample")
_DISTILLED = ("LCMScheduler", "TCDScheduler")
_PICTURES_LIMIT = 16


def make_settings(
    folder: Path,
    manifest: BundleManifest,
    models: Mapping[ComponentName, str],
    extents: Mapping[str, Extent],
    scheduler: str | None,
) -> dict[str, Any]:
    """What `triton_models/drawing.py` reads. `models` are the networks' names in Triton, `extents` what they take.

    Raises `UsageError` for a bundle or a scheduler that the pipeline in Triton cannot follow.
    """
    vae = read_config(folder, ComponentName.VAE_DECODER)
    height_px, width_px = manifest.profile.height_px.opt, manifest.profile.width_px.opt
    factor = manifest.require_pixels_per_latent()
    is_xl = manifest.family.is_xl
    normalised = is_xl and vae.get("latents_mean") is not None and vae.get("latents_std") is not None
    index = _read_table(folder / "model_index.json")
    return {
        "schema_version": 1,
        "networks": {name: _describe_network(manifest, name, model, extents) for name, model in models.items()},
        "texts": {name: _describe_text(folder, manifest, name) for name in models if name.is_text_encoder},
        "latents": [int(vae["latent_channels"]), height_px // factor, width_px // factor],
        "vae": {
            "scaling_factor": float(vae.get("scaling_factor", 0.18215)),
            "mean": list(vae["latents_mean"]) if normalised else None,
            "deviation": list(vae["latents_std"]) if normalised else None,
        },
        "schedule": _describe_schedule(folder, manifest, scheduler),
        "time_ids": [height_px, width_px, 0, 0, height_px, width_px] if is_xl else None,
        "zeros_without_negative": is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        "pictures_limit": _PICTURES_LIMIT,
        "defaults": {"steps": 20, "guidance_scale": 7.5},
    }


def require_text_to_image(manifest: BundleManifest) -> None:
    """Raise `UsageError` for a bundle that cannot draw from one chunk of prompt alone."""
    if manifest.profile.tokens.min > CHUNK_TOKENS:
        raise UsageError(
            f"{manifest.name} takes prompts of {manifest.profile.tokens.min} tokens only, and the pipeline in Triton "
            f"gives {CHUNK_TOKENS}",
            hint=f"build another: {variant_command('--tokens 77')}",
        )
    if Task.TEXT_TO_IMAGE not in manifest.tasks:
        raise UsageError(
            f"{manifest.name} starts from a picture, and the pipeline in Triton draws from prompts alone",
            hint="export the base model",
        )
    if any(tensor.dtype is DType.BF16 for part in manifest.components.values() for tensor in part.spec.inputs):
        raise UsageError(
            f"{manifest.name} takes bf16, and the pipeline in Triton computes with numpy, which does not have it",
            hint=f"build another: {variant_command('--precision fp16')}",
        )
    if any(tensor.name == "timestep_cond" for tensor in manifest.require_component(ComponentName.UNET).spec.inputs):
        raise UsageError(
            f"{manifest.name} is distilled for guidance as an input, which Triton's pipeline does not have",
            hint="export the model that it was distilled from",
        )


def write_tokenizers(folder: Path, settings: Mapping[str, Any], target: Path) -> None:
    """A file of the library `tokenizers` for each text encoder; a bundle may hold vocabulary and merges only."""
    for name, text in settings["texts"].items():
        tokenizer = _load_tokenizer(folder, ComponentName(name))
        (target / text["tokenizer"]).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")


def _describe_network(
    manifest: BundleManifest, name: ComponentName, model: str, extents: Mapping[str, Extent]
) -> dict[str, Any]:
    spec = manifest.components[name].spec
    batch = extents[str(spec.inputs[0].axes[0])]
    return {
        "model": model,
        "rows": [batch.min, batch.max],
        "inputs": {tensor.name: DTYPES[tensor.dtype].array for tensor in spec.inputs},
    }


def _describe_text(folder: Path, manifest: BundleManifest, name: ComponentName) -> dict[str, Any]:
    tokenizer = _load_tokenizer(folder, name)
    outputs = [tensor.name for tensor in manifest.components[name].spec.outputs]
    hidden = [output for output in outputs if output.startswith("hidden_states.")]
    return {
        "tokenizer": f"{_tokenizer_folder(name)}.json",
        "tokens": min(tokenizer.model_max_length, CHUNK_TOKENS),
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        # The last of them is the last but one of torch's, which SDXL conditions on.
        "states": hidden[-1] if manifest.family.is_xl else "last_hidden_state",
        "pooled": "text_embeds" if "text_embeds" in outputs and manifest.family.is_xl else None,
    }


def _describe_schedule(folder: Path, manifest: BundleManifest, name: str | None) -> dict[str, Any]:
    base = _read_table(folder / "scheduler" / "scheduler_config.json")
    chosen = _choose_scheduler(base, name)
    own = name is None and base.get("_class_name") == _KINDS[chosen]
    scheduler: Any = make_scheduler(
        None if own else chosen, base, family=manifest.family, prediction=manifest.prediction
    )
    config = scheduler.config
    special = [key for key in _SPECIAL if config.get(key)]
    if special or config.get("interpolation_type", "linear") != "linear":
        raise UsageError(
            f"the checkpoint's scheduler sets {special[0] if special else 'interpolation_type'}, which Triton's "
            "pipeline does not know",
            hint="choose one with --scheduler euler or --scheduler ddim",
        )
    return {
        "kind": chosen.value,
        "prediction": config["prediction_type"],
        "spacing": config["timestep_spacing"],
        "steps_offset": int(config["steps_offset"]),
        "num_train_timesteps": int(config["num_train_timesteps"]),
        "alphas_cumprod": [float(value) for value in scheduler.alphas_cumprod],
        "final_alpha_cumprod": float(getattr(scheduler, "final_alpha_cumprod", 1.0)),
        "final_sigma": config.get("final_sigmas_type", "zero"),
    }


def _choose_scheduler(base: Mapping[str, Any], name: str | None) -> SchedulerName:
    """The named one; else the checkpoint's own where Triton's pipeline has it; else Euler."""
    if name is not None:
        chosen = parse_scheduler(name)
        if chosen not in _KINDS:
            raise UsageError(
                f"Triton's pipeline has no scheduler {chosen.value!r}", hint=f"choose one of {', '.join(_KINDS)}"
            )
        return chosen
    own = base.get("_class_name")
    if own in _DISTILLED:
        raise UsageError(
            f"the checkpoint draws with {own}, which Triton's pipeline does not have",
            hint="choose another with --scheduler euler, if the model can draw with it",
        )
    return next((kind for kind, entry in _KINDS.items() if entry == own), SchedulerName.EULER)


def _load_tokenizer(folder: Path, encoder: ComponentName) -> Any:
    from transformers import CLIPTokenizer

    path = folder / _tokenizer_folder(encoder)
    if not path.is_dir():
        raise ArtifactError(f"{folder} has no {path.name}", hint="build the bundle again")
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def _tokenizer_folder(encoder: ComponentName) -> str:
    return encoder.value.replace("text_encoder", "tokenizer")


def _read_table(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_bytes())
    if not isinstance(table, dict):
        raise ArtifactError(f"{path} is not a table")
    return table
