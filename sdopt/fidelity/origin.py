"""The checkpoint that a quantised bundle was made from: torch draws from its weights, not from the rounded ones."""

from __future__ import annotations

from collections.abc import Mapping

from sdopt.bundle.manifest import BundleManifest
from sdopt.checkpoint.checkpoint import Choice
from sdopt.checkpoint.source import open_checkpoint
from sdopt.errors import ArtifactError, CheckpointError
from sdopt.model.backend_settings import graph_dtype
from sdopt.model.component import ComponentName
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
        found = {name: checkpoint.components[name].tensors for name in quantized}
    except (CheckpointError, KeyError) as error:
        raise ArtifactError(f"{missing}{error}", hint=f"put it back at {recipe.source}") from error
    for name, record in quantized.items():
        if identify_weights(found[name], graph_dtype(record.precision, record.backend)) != record.weights_key:
            raise ArtifactError(
                f"{missing}{recipe.source} has other files now", hint="build the bundle again from what is there"
            )
    return found
