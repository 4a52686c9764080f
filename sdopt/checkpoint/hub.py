"""A Hugging Face id -> the folder of its snapshot, without files that are not needed.

The only user of huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt.checkpoint.weight_files import INDEX_NAME
from sdopt.disk.files import disk_errors
from sdopt.errors import CheckpointError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
# A missing file that was given by a relative path must not be asked for on the hub.
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".json")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SMALL = re.compile(
    r"^(model_index\.json|README\.md|(scheduler|tokenizer|tokenizer_2)/[^/]+\.(json|txt)|(unet|vae|text_encoder|text_encoder_2)/config\.json)$"
)
_WEIGHTS = re.compile(
    r"^(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?P<variant>\.[\w]+)?(-\d{5}-of-\d{5})?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?P<late>\.[\w]+)?\.json)?$"
)
# fp16 files are half the download, and what published models were mostly run in.
_PREFERRED = (("safetensors", "fp16"), ("safetensors", ""), ("bin", "fp16"), ("bin", ""))


@dataclass(frozen=True)
class Snapshot:
    folder: Path
    revision: str


def is_hub_id(source: str) -> bool:
    """Whether a source reads as `owner/name`, with an optional `@revision`."""
    return bool(_ID.match(source)) and not source.endswith(_FILE_SUFFIXES)


def fetch_snapshot(source: str, *, offline: bool = False) -> Snapshot:
    """The snapshot of `owner/name[@revision]` in the Hugging Face cache; fetches only what is not there yet.

    Offline (`HF_HUB_OFFLINE=1`, `offline`, or no connection) the cache alone is asked. Raises `CheckpointError` with
    what to do next, `MissingHardware` for a full disk.
    """
    from huggingface_hub import constants

    return _fetch(source, choose_files, offline or constants.HF_HUB_OFFLINE)


def fetch_vae(source: str, *, offline: bool = False) -> Path:
    """The folder of a VAE on the hub, or of the model that it is a part of; nothing else of it is fetched.

    Raises as `fetch_snapshot`.
    """
    from huggingface_hub import constants

    return _fetch(source, choose_vae_files, offline or constants.HF_HUB_OFFLINE).folder


Choose = Callable[[Sequence[str], str], list[str]]
"""The files that are needed of those that a repository has; the second is its name, for messages."""


def _fetch(source: str, choose: Choose, offline: bool) -> Snapshot:
    from huggingface_hub import constants

    name, _, revision = source.partition("@")
    with disk_errors(Path(constants.HF_HUB_CACHE)):
        try:
            folder = _download(name, revision or None, choose, offline)
        except _hub_errors() as error:
            # An `OSError` of the system's is the disk's; the hub's own have no number.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _explain(source, name, error) from error
    return Snapshot(folder, folder.name)


def _download(name: str, revision: str | None, choose: Choose, offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    if not offline:
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except _hub_errors():
            # No connection: the model may be in the cache.
            pass
        else:
            files = choose([entry.rfilename for entry in info.siblings or ()], name)
            return Path(huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=files))
    return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))


def _hub_errors() -> tuple[type[Exception], ...]:
    """All that huggingface_hub raises: its own are `OSError`s, those of its HTTP library share a base with them."""
    from huggingface_hub import errors

    http = [kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (OSError, errors.EntryNotFoundError, *http)


def _explain(source: str, name: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            what = f"{name} asks you to accept its licence first"
            hint = f"accept it on https://huggingface.co/{name}, then run: hf auth login"
        case errors.RevisionNotFoundError():
            what = f"{name} has no revision {source.partition('@')[2]}"
            hint = f"see https://huggingface.co/{name}/commits/main"
        case errors.RepositoryNotFoundError():
            what = f"there is no file or folder {source}, and no public model of that name on Hugging Face"
            hint = "check the spelling; for a private model run: hf auth login"
        case errors.LocalEntryNotFoundError():
            what = f"{source} is neither a path here nor in the Hugging Face cache, and the hub was not reached"
            hint = "connect to the network, unset HF_HUB_OFFLINE, or give a local path"
        case _:
            what = f"Hugging Face did not give {name}: {str(error).strip().partition(chr(10))[0][:200]}"
            hint = "try again later, or give a local path"
    return CheckpointError(what, hint=hint)


def choose_files(names: Sequence[str], model: str) -> list[str]:
    """The files of a repository that sdopt needs: configs, tokenizers, and one set of weights for a network.

    safetensors before pickles, fp16 before the plain file, never another variant where one of these is there.
    """
    if INDEX_NAME not in names:
        files = [name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
        advice = (
            f"download one of {', '.join(files[:3])} and give its path" if files else "give a Stable Diffusion model"
        )
        raise CheckpointError(f"{model} on Hugging Face is not a diffusers model: it has no {INDEX_NAME}", hint=advice)
    chosen = [name for name in names if _SMALL.match(name)]
    for part in _PARTS:
        chosen += _choose_weights(names, part)
    return sorted(chosen)


def choose_vae_files(names: Sequence[str], model: str) -> list[str]:
    """The files of a VAE: of the repository's folder `vae`, or of the whole repository where that is one."""
    for part in ("vae", ""):
        weights = _choose_weights(names, part)
        config = f"{part}/config.json" if part else "config.json"
        if weights and config in names:
            return sorted([config, *weights])
    raise CheckpointError(
        f"{model} on Hugging Face has no VAE: neither vae/config.json nor config.json with its weights",
        hint="--vae takes a diffusers VAE folder, a single file, or a Hugging Face id",
    )


def _choose_weights(names: Sequence[str], part: str) -> list[str]:
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        found = _WEIGHTS.match(last) if folder == part else None
        if found:
            variant = (found["variant"] or found["late"] or "").removeprefix(".")
            sets.setdefault((found["kind"], variant), []).append(name)
    best = next((key for key in _PREFERRED if key in sets), min(sets, default=None))
    return sets[best] if best else []
