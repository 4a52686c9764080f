"""The checkpoint that a quantised bundle was made from: torch draws from its weights, not from the rounded ones."""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.adapters.bake import bake
from sdopt.bundle.manifest import BundleManifest
from sdopt.checkpoint.checkpoint import Choice
from sdopt.checkpoint.source import open_checkpoint
from sdopt.disk.store import Store, cache_root
from sdopt.errors import AdapterError, ArtifactError, CheckpointError
from sdopt.model.backend_settings import graph_dtype
from sdopt.model.component import ComponentName
from sdopt.model.lora import parse_lora
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.stream import identify_weights


def find_origin(manifest: BundleManifest) -> dict[ComponentName, Mapping[str, TensorRef]]:
    """The tensors of every component whose weight file is quantised. Asks no network.

    Raises `ArtifactError` where the checkpoint is not where it was, or is not what it was.
    """
    quantized = {name: record for name, record in manifest.components.items() if record.is_quantized}
    if not quantized:
        return {}
    recipe = manifest.recipe
    source = f"{recipe.source}@{manifest.source.revision}" if manifest.source.revision else recipe.source
    missing = f"torch needs the checkpoint that {manifest.name} was quantised from, which is not there: "
    try:
        checkpoint = open_checkpoint(source, Choice(recipe.vae, recipe.prediction, recipe.ema, offline=True))
        own = {name: part.tensors for name, part in checkpoint.components.items()}
        baked = bake(own, [parse_lora(text) for text in recipe.lora], Store(cache_root())).components
        found = {name: baked[name] for name in quantized}
    except (CheckpointError, AdapterError, KeyError) as error:
        raise ArtifactError(f"{missing}{error}", hint=f"put it back at {recipe.source}") from error
    for name, record in quantized.items():
        if identify_weights(found[name], graph_dtype(record.precision, record.backend)) != record.weights_key:
            raise ArtifactError(
                f"{missing}{recipe.source} has other files now", hint="build the bundle again from what is there"
            )
    return found
