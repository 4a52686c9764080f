"""The weight files of one component's folder -> tensors by name. Variants, shards, links and pickles end
here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdopt.checkpoint.other_things import refuse_file
from sdopt.errors import CheckpointError, UnsafeInputError
from sdopt.weights.safetensors_header import SafetensorsFile, TensorRef, read_header

INDEX_NAME = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_KINDS = ("safetensors", "bin")
_PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
_JSON_LIMIT_BYTES = 64 << 20


def open_component_weights(folder: Path) -> Mapping[str, TensorRef]:
    """Tensors of a component's folder as diffusers and transformers write it.

    The plain file is preferred to a variant (`fp16` to any other), and safetensors to pickles, which are
    converted in a sandbox. Raises `CheckpointError` where there are no weights or a shard is missing.
    """
    for kind in _KINDS:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        for stem in _STEMS:
            for variant in _order_variants(names, stem, kind):
                single = _with_variant(f"{stem}.{kind}", variant)
                index = _with_variant(f"{stem}.{kind}.index.json", variant)
                if single in names:
                    return open_tensors(follow_link(folder / single))
                if index in names:
                    return _open_shards(folder, index)
    raise CheckpointError(
        f"{folder} holds no weights: no *.safetensors and no *.bin that diffusers would load",
        hint="download the folder again",
    )


def open_tensors(path: Path) -> Mapping[str, TensorRef]:
    """Tensors of one weight file, whatever its kind."""
    return open_tensors_file(path).tensors


def open_tensors_file(path: Path) -> SafetensorsFile:
    """One weight file by what it is, not by its name: safetensors as it is, a pickle through the sandbox.

    Raises `CheckpointError` for a file that is missing, damaged or of another format, `UnsafeInputError` for
    one that contradicts itself or wants to run code.
    """
    refuse_file(path)
    with path.open("rb") as file:
        start = file.read(16)
    # A safetensors header is JSON behind eight bytes; zip archives and pickles have their first bytes.
    looks_pickled = path.suffix in _PICKLE_SUFFIXES or start.startswith((b"PK\x03\x04", b"\x80"))
    if looks_pickled and start[8:9] != b"{":
        from sdopt.checkpoint.pickle_sandbox import convert_pickle

        path = convert_pickle(path)
    return read_header(path)


def follow_link(path: Path) -> Path:
    """The real file. A link must stay inside the model's folder or inside the Hugging Face cache that holds
    it.

    The cache keeps `snapshots/REVISION/unet/x.safetensors` as a link to `blobs/DIGEST`. Give a `path` whose
    model's folder is resolved: only links inside it are meant here.
    """
    real = path.resolve()
    model = path.parent if (path.parent / INDEX_NAME).exists() else path.parent.parent
    caches = (folder.parent / "blobs" for folder in path.parents if folder.name == "snapshots")
    if not any(real.is_relative_to(root) for root in (model, *caches)):
        raise UnsafeInputError(
            f"{path} is a link that leaves its model: it points to {real}",
            hint="replace the link with the file or folder itself",
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is missing", hint="download the folder again")
    return real


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table of a model's folder. Raises `CheckpointError` that names the file."""
    real = follow_link(path)
    if real.stat().st_size > _JSON_LIMIT_BYTES:
        raise CheckpointError(f"{path} is larger than any config")
    try:
        values = json.loads(real.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="download the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a table")
    return values


def _order_variants(names: set[str], stem: str, kind: str) -> list[str]:
    """Variants that are there for a stem, the plain one ("") first, then fp16."""
    found = set()
    for name in names:
        parts = name.removesuffix(".json").split(".")
        if parts[0] != stem or parts[1:2] == [""] or kind not in parts:
            continue
        rest = [part for part in parts[1:] if part not in (kind, "index")]
        if len(rest) <= 1 and "-of-" not in "".join(rest):
            found.add(rest[0] if rest else "")
    return sorted(found, key=lambda variant: (variant != "", variant != "fp16", variant))


def _with_variant(name: str, variant: str) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`; an index gets it before its last part, as the
    libraries do."""
    if not variant:
        return name
    head, _, last = name.rpartition(".")
    return f"{head}.{variant}.{last}"


def _open_shards(folder: Path, index: str) -> Mapping[str, TensorRef]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / index} names no shards")
    tensors: dict[str, TensorRef] = {}
    for shard in sorted(set(places.values())):
        # A shard lies beside its index: a name with a folder in it could leave the model.
        if PurePosixPath(shard).name != shard or shard == ".." or any(mark in shard for mark in "\\:\0"):
            raise UnsafeInputError(f"{folder / index} names the shard {shard!r}, which is not a plain file name")
        for name, ref in open_tensors(follow_link(folder / shard)).items():
            if places.get(name) != shard or name in tensors:
                raise CheckpointError(f"{folder / shard}: the index does not place tensor {name!r} there")
            tensors[name] = ref
    absent = places.keys() - tensors.keys()
    if absent:
        raise CheckpointError(
            f"{folder}: the shards lack tensor {min(absent)!r} and {len(absent) - 1} more",
            hint="download the folder again",
        )
    return tensors
