"""What every reader of checkpoints returns: a model as configs, byte ranges and small folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdopt.bundle.records import SourceRecord
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config, unet_factor, vae_factor
from sdopt.model.family import Family, Prediction
from sdopt.model.task import Task
from sdopt.weights.safetensors_header import TensorRef


@dataclass(frozen=True)
class ComponentSource:
    """One network: its diffusers or transformers config, and its tensors by diffusers' or transformers'
    names.

    The VAE's two halves share a config; the decoder has `decoder.*` and `post_quant_conv.*`, the encoder
    `encoder.*` and `quant_conv.*`.
    """

    name: ComponentName
    config: Config
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True)
class Choice:
    """What the user says of a checkpoint. `prediction` overrides what the model says; `vae` replaces its VAE or fills
    its gap: a diffusers VAE folder, a single file or a Hugging Face id. `ema` takes the averaged copy of the UNet.
    With `offline`, the network is not asked.
    """

    vae: str = ""
    prediction: Prediction | None = None
    ema: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A readable model. `prediction` is None where neither tensors nor metadata say what the UNet predicts.

    `tasks` is what it can be asked for, what it was made for first. `tokenizers` maps the folder's name in a pipeline
    (`tokenizer`, `tokenizer_2`) to a folder with its files; `pipeline_options` are the entries of diffusers'
    `model_index.json` that are not components.
    """

    source: SourceRecord
    family: Family
    prediction: Prediction | None
    tasks: tuple[Task, ...]
    components: Mapping[ComponentName, ComponentSource]
    scheduler: Config
    tokenizers: Mapping[str, Path]
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    """How many tensors of the file no component uses, by what they are."""

    @property
    def unet(self) -> ComponentSource:
        return self._require(ComponentName.UNET)

    @property
    def vae_decoder(self) -> ComponentSource:
        return self._require(ComponentName.VAE_DECODER)

    @property
    def pixels_per_latent(self) -> int:
        """Along a side. Raises `CheckpointError` without a VAE, as `vae_decoder` does."""
        return vae_factor(self.vae_decoder.config)

    @property
    def multiple_px(self) -> int:
        """What both sides of a picture have to be a multiple of."""
        return self.pixels_per_latent * unet_factor(self.unet.config)

    def _require(self, name: ComponentName) -> ComponentSource:
        if name not in self.components:
            raise CheckpointError(f"{self.source.location} is not a whole model: it lacks {name}")
        return self.components[name]
