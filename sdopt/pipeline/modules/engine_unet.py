"""`UNet2DConditionModel` over an engine session."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sdopt.errors import UsageError
from sdopt.model.component import Config, unet_factor
from sdopt.model.shape import ShapeProfile
from sdopt.pipeline.batches import run_rows
from sdopt.pipeline.finite import require_finite
from sdopt.pipeline.modules.engine_module import EngineModule, complete_config, given_inputs
from sdopt.pipeline.sizes import require_size

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session
    from sdopt.pipeline.lora_stack import LoraStack
    from sdopt.pipeline.opened import OpenedBundle
    from sdopt.pipeline.word_stack import WordStack


class EngineUNet(EngineModule):
    """`UNet2DConditionModel` over a session.

    `bundle` is what the pipeline was loaded from, and `loras` and `words` are the
    adapters of its engines and the words that were added to their vocabulary.

    `sample_size` is the default side of pictures, in latent elements; `pixels_per_latent` is the VAE's
    factor.
    """

    def __init__(self, session: Session, config: Config, *, sample_size: int, pixels_per_latent: int) -> None:
        super().__init__()
        self.session = session
        self.sessions = (session,)
        self.pixels_per_latent = pixels_per_latent
        self.bundle: OpenedBundle | None = None
        self.loras: LoraStack | None = None
        self.words: WordStack | None = None
        # Who draws with these engines. Pipelines that share them share it.
        self.turn = threading.RLock()
        # Pipelines rewrite a sample_size below 64 when the config says that an old diffusers wrote it.
        overrides = {"sample_size": sample_size, "_diffusers_version": diffusers.__version__}
        self.config = complete_config(diffusers.UNet2DConditionModel, {**config, **overrides})
        if width := self.config.projection_class_embeddings_input_dim:
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict noise (rows, channels, latent height, latent width), fp32.

        Raises `ShapeError` for a size not built for, and `UsageError` for an argument that the graph has no
        input for.
        """
        height_px, width_px = (side * self.pixels_per_latent for side in sample.shape[2:])
        self.check_size(width_px, height_px)
        optional: dict[str, Any] = {
            "class_labels": class_labels,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "timestep_cond": timestep_cond,
            **(added_cond_kwargs or {}),
        }
        inputs = {
            "sample": sample,
            "timestep": _scalar(timestep),
            "encoder_hidden_states": encoder_hidden_states,
            **given_inputs(self.session.spec, optional),
        }
        predicted = run_rows(self.session, self._complete(inputs, sample.shape[0]))["out_sample"]
        self._require_finite(sample, predicted)
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def _require_finite(self, sample: torch.Tensor, predicted: torch.Tensor) -> None:
        """On the CPU, where it costs nothing. A GPU would have to wait at each step: there the VAE finds it."""
        if self.refuses_nonfinite and predicted.device.type == "cpu":
            require_finite(sample, "the scheduler gave latents with")
            require_finite(predicted, "the unet predicted")

    def check_size(self, width_px: int, height_px: int) -> None:
        """Raise `ShapeError` for a picture that the engine cannot draw; the nearest that it can is named."""
        multiple_px = self.pixels_per_latent * unet_factor(self.config)
        folder = None if self.bundle is None else self.bundle.folder
        require_size(
            self.session, width_px, height_px, self.pixels_per_latent, multiple_px=multiple_px, folder=folder
        )  # fmt: skip
        # A range has sizes at which the skip connections of this UNet do not meet.
        profile = ShapeProfile.static(width_px=width_px, height_px=height_px)
        profile.check_against(multiple_px)

    def _complete(self, inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        known = {tensor.name for tensor in self.session.spec.inputs}
        if "timestep_cond" in known - inputs.keys():
            # Its projection has no bias: zeros are the same as the absent condition of torch.
            width = self.session.spec.input("timestep_cond").axes[1]
            inputs["timestep_cond"] = torch.zeros(rows, int(width), device=self.device)
        if missing := known - inputs.keys():
            raise UsageError(f"this UNet needs {' and '.join(sorted(missing))}, which the pipeline did not pass")
        return inputs


def _scalar(timestep: torch.Tensor | float) -> torch.Tensor:
    steps = torch.as_tensor(timestep, dtype=torch.float32)
    if steps.ndim == 0:
        # The way of every pipeline. Comparing values would make the host wait for a timestep that is on a GPU.
        return steps
    steps = steps.flatten()
    if not bool((steps == steps[0]).all()):
        raise UsageError("unet: the engine takes one timestep for all rows, not one for each")
    return steps[0]
