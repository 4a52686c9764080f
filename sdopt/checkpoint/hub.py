"""A Hugging Face id -> the folder of its snapshot, with no file that is not needed. The only user of
huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.checkpoint.weights import INDEX_NAME
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


def fetch_snapshot(source: str) -> Snapshot:
    """The snapshot of `owner/name[@revision]` in the Hugging Face cache; downloads only what is not there
    yet.

    Offline (`HF_HUB_OFFLINE=1`) the cache alone is asked. Raises `CheckpointError` with what to do next.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    name, _, revision = source.partition("@")
    wanted = revision or None
    try:
        if constants.HF_HUB_OFFLINE:
            folder = huggingface_hub.snapshot_download(name, revision=wanted, local_files_only=True)
        else:
            info = huggingface_hub.HfApi().model_info(name, revision=wanted)
            files = choose_files([entry.rfilename for entry in info.siblings or ()], name)
            folder = huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=files)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} asks you to accept its licence first",
            hint=f"accept it on https://huggingface.co/{name}, then run: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no file or folder {source}, and no public model of that name on Hugging Face",
            hint="check the spelling; for a private model run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision}", hint=f"see https://huggingface.co/{name}/commits/main"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{source} is neither a path here nor in the Hugging Face cache, and the hub cannot be asked",
            hint="connect to the network, unset HF_HUB_OFFLINE, or give a local path",
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(
            f"Hugging Face did not give {name}: {_first_line(error)}",
            hint="try again later, or give a local path",
        ) from error
    except _connection_errors() as error:
        raise CheckpointError(
            f"{source} is no file or folder here, and Hugging Face cannot be reached: {_first_line(error)}",
            hint="connect to the network, or give a local path",
        ) from error
    return Snapshot(Path(folder), Path(folder).name)


def choose_files(names: Sequence[str], model: str) -> list[str]:
    """The files of a repository that sdopt needs: configs, tokenizers, and one set of weights for each
    component.

    safetensors before pickles, fp16 before the plain file, never another variant where one of these is there.
    """
    if INDEX_NAME not in names:
        files = [name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
        advice = (
            f"download one of {', '.join(files[:3])} and give its path"
            if files
            else "give a Stable Diffusion model"
        )
        raise CheckpointError(
            f"{model} on Hugging Face is no diffusers model: it has no {INDEX_NAME}", hint=advice
        )
    chosen = [name for name in names if _SMALL.match(name)]
    for part in _PARTS:
        sets: dict[tuple[str, str], list[str]] = {}
        for name in names:
            folder, _, last = name.rpartition("/")
            found = _WEIGHTS.match(last) if folder == part else None
            if found:
                variant = (found["variant"] or found["late"] or "").removeprefix(".")
                sets.setdefault((found["kind"], variant), []).append(name)
        best = next((key for key in _PREFERRED if key in sets), min(sets, default=None))
        chosen += sets[best] if best else []
    return sorted(chosen)


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library under huggingface_hub raises; version 1 changed from requests to httpx."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for library, kind in (("httpx", "HTTPError"), ("requests", "RequestException")):
        try:
            module: Any = __import__(library)
        except ImportError:
            continue
        found.append(getattr(module, kind))
    return tuple(found)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
