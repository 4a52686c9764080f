"""SOURCE, as a user writes it -> `Checkpoint`: which reader a path or a Hugging Face id belongs to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sdopt.bundle.records import SourceRecord
from sdopt.checkpoint.checkpoint import Checkpoint, Choice
from sdopt.checkpoint.folder import open_folder, read_tasks
from sdopt.checkpoint.hub import fetch_snapshot, is_hub_id
from sdopt.checkpoint.infer import SCALING
from sdopt.checkpoint.other_things import refuse_url
from sdopt.checkpoint.single_file import check_vae_fits, open_single_file, open_vae
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, vae_factor


def open_checkpoint(source: str, choice: Choice | None = None) -> Checkpoint:
    """Open a diffusers folder, a single file or a Hugging Face id; no tensor is loaded.

    Raises `CheckpointError` for what is missing, damaged, contradictory or of another family, `UnsafeInputError` for a
    pickle that wants to run code or a file that contradicts itself. Asks the network only for an id that is not a local
    path, and not if the choice is offline.
    """
    choice = choice or Choice()
    refuse_url(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _adapt(open_folder(path.resolve(), SourceRecord(kind="diffusers", location=source), choice), choice)
    if path.is_file():
        return open_single_file(path.resolve(), SourceRecord(kind="single-file", location=source), choice)
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{source} is neither a file nor a folder, or a link to nothing")
    if not is_hub_id(source):
        raise CheckpointError(
            f"there is no file or folder {source}",
            hint="give a diffusers folder, a .safetensors or .ckpt file, or a Hugging Face id as owner/name",
        )
    snapshot = fetch_snapshot(source, offline=choice.offline)
    record = SourceRecord(kind="huggingface", location=source.partition("@")[0], revision=snapshot.revision)
    return _adapt(open_folder(snapshot.folder.resolve(), record, choice), choice)


def _adapt(checkpoint: Checkpoint, choice: Choice) -> Checkpoint:
    """A folder's model with the VAE that the user asked for, which must fit the one that it was trained on."""
    if not choice.vae:
        return checkpoint
    own = checkpoint.components.get(ComponentName.VAE_DECODER)
    scaling = SCALING[checkpoint.family] if own is None else float(own.config["scaling_factor"])
    pixels_per_latent = None if own is None else vae_factor(own.config)
    components = {**checkpoint.components, **open_vae(choice.vae, checkpoint.family, offline=choice.offline)}
    check_vae_fits(components, scaling, pixels_per_latent, choice.vae)
    ordered = {name: components[name] for name in ComponentName if name in components}
    tasks = read_tasks(ordered, checkpoint.family, choice.vae)
    return dataclasses.replace(checkpoint, components=ordered, tasks=tasks)
