"""SOURCE, as a user writes it -> `Checkpoint`: which reader a path or a Hugging Face id belongs to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sdopt.bundle.records import SourceRecord
from sdopt.checkpoint.checkpoint import Checkpoint
from sdopt.checkpoint.folder import is_inpainting, open_folder
from sdopt.checkpoint.hub import fetch_snapshot, is_hub_id
from sdopt.checkpoint.scheduler_config import with_prediction
from sdopt.checkpoint.single_file import open_single_file, open_vae
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction


def open_checkpoint(
    source: str, *, vae: str = "", prediction: Prediction | None = None, offline: bool = False
) -> Checkpoint:
    """Open a diffusers folder, a single file or a Hugging Face id; no tensor is loaded.

    `vae` replaces the model's VAE: a diffusers VAE folder or a single file. `prediction` overrides what the
    model says. Raises `CheckpointError` for what is missing, damaged or of another family, `UnsafeInputError`
    for a pickle that wants to run code or a file that contradicts itself. Asks the network only for an id
    that is no local path, and not if `offline`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _adapt(open_folder(path.resolve(), SourceRecord(kind="diffusers", location=source)), vae, prediction)
    if path.is_file():
        record = SourceRecord(kind="single-file", location=source)
        return open_single_file(path.resolve(), record, vae=vae, prediction=prediction)
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{source} is neither a file nor a folder, or a link to nothing")
    if not is_hub_id(source):
        raise CheckpointError(
            f"there is no file or folder {source}",
            hint="give a diffusers folder, a .safetensors or .ckpt file, or a Hugging Face id as owner/name",
        )
    snapshot = fetch_snapshot(source, offline=offline)
    record = SourceRecord(kind="huggingface", location=source.partition("@")[0], revision=snapshot.revision)
    return _adapt(open_folder(snapshot.folder.resolve(), record), vae, prediction)


def _adapt(checkpoint: Checkpoint, vae: str, prediction: Prediction | None) -> Checkpoint:
    """A folder's model with the VAE and the prediction that the user asked for."""
    if prediction is not None:
        scheduler = with_prediction(checkpoint.scheduler, prediction)
        checkpoint = dataclasses.replace(checkpoint, prediction=prediction, scheduler=scheduler)
    if vae:
        components = {**checkpoint.components, **open_vae(vae, checkpoint.family)}
        _check_scaling(checkpoint, components[ComponentName.VAE_DECODER].config["scaling_factor"], vae)
        inpainting = is_inpainting(components, vae)
        checkpoint = dataclasses.replace(checkpoint, components=components, inpainting=inpainting)
    return checkpoint


def _check_scaling(checkpoint: Checkpoint, scaling: float, vae: str) -> None:
    own = checkpoint.components[ComponentName.VAE_DECODER].config["scaling_factor"]
    if abs(own - scaling) > 1e-6 * abs(own):
        raise CheckpointError(
            f"the VAE {vae} scales its latents by {scaling}, and the model was trained on {own}",
            hint="a VAE must be of the same family as the model",
        )
