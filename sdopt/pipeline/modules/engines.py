"""What diffusers pipelines take for a UNet, a VAE and text encoders, each over an engine session.

They have the attributes and calls that the Stable Diffusion pipelines use of the torch modules. What a fixed
graph cannot do (LoRA, ControlNet residuals, other attention) is refused with a reason, never ignored. They do
not know which runtime computes, nor in which precision: to the pipeline they are fp32 on the device of their sessions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from sdopt.errors import UsageError
from sdopt.model.component import Config, has_projection, unet_factor, vae_factor
from sdopt.model.shape import ShapeProfile
from sdopt.pipeline.batches import run_rows
from sdopt.pipeline.prompt import run_in_chunks
from sdopt.pipeline.sizes import check_picture_size, require_size

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session
    from sdopt.pipeline.opened import OpenedBundle


class NotInEngineError(UsageError, AttributeError):
    """Code asked for a part of a torch network. An AttributeError too, so that `hasattr` says no."""


class EngineModule(torch.nn.Module):
    """A network that an engine computes: fp32 to the outside, and not to be moved, cast or changed."""

    config: Any
    sessions: tuple[Session, ...]
    dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the engine computes, and where its outputs are."""
        return self.sessions[0].device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise NotInEngineError(
                f"{type(self).__name__} has no {name!r}: the graph of an engine is fixed when it is built",
                hint="change the checkpoint (merge the LoRA, say), then build again with sdopt convert",
            ) from None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Nothing: an engine keeps its precision. Raises `UsageError` for another device than its own."""
        places = [v for v in (*args, *kwargs.values()) if isinstance(v, (str, torch.device))]
        if elsewhere := [place for place in places if torch.device(place).type != self.device.type]:
            raise UsageError(
                f"{type(self).__name__} cannot move to {elsewhere[0]}: an engine runs where it was built for",
                hint="leave out .to(...), or build for another target with sdopt convert --target",
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        del fn, recurse
        return self

    def close(self) -> None:
        """Free the engine. The module cannot be called any more."""
        for session in self.sessions:
            session.close()


class EngineUNet(EngineModule):
    """`UNet2DConditionModel` over a session. `bundle` is what the pipeline was loaded from.

    `sample_size` is the default side of pictures, in latent elements; `pixels_per_latent` is the VAE's
    factor.
    """

    def __init__(self, session: Session, config: Config, *, sample_size: int, pixels_per_latent: int) -> None:
        super().__init__()
        self.session = session
        self.sessions = (session,)
        self.pixels_per_latent = pixels_per_latent
        self.bundle: OpenedBundle | None = None
        # Pipelines rewrite a sample_size below 64 when the config says that an old diffusers wrote it.
        overrides = {"sample_size": sample_size, "_diffusers_version": diffusers.__version__}
        self.config = _complete_config(diffusers.UNet2DConditionModel, {**config, **overrides})
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
        _refuse("unet", "class_labels", class_labels)
        _refuse("unet", "attention_mask", attention_mask)
        _refuse("unet", "encoder_attention_mask", encoder_attention_mask)
        _refuse("unet", "cross_attention_kwargs", cross_attention_kwargs or None)
        _refuse("unet", "residuals of a ControlNet", down_block_additional_residuals)
        _refuse("unet", "residuals of a ControlNet", mid_block_additional_residual)
        _refuse("unet", "residuals of a T2I adapter", down_intrablock_additional_residuals)
        height_px, width_px = (side * self.pixels_per_latent for side in sample.shape[2:])
        self.check_size(width_px, height_px)
        inputs = {
            "sample": sample,
            "timestep": _scalar(timestep),
            "encoder_hidden_states": encoder_hidden_states,
        }
        inputs |= {name: value for name, value in (added_cond_kwargs or {}).items() if value is not None}
        if timestep_cond is not None:
            inputs["timestep_cond"] = timestep_cond
        predicted = run_rows(self.session, self._fitted(inputs, sample.shape[0]))["out_sample"]
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def check_size(self, width_px: int, height_px: int) -> None:
        """Raise `ShapeError` for a picture that the engine cannot draw; the nearest that it can is named."""
        require_size(self.session, width_px, height_px, self.pixels_per_latent)
        # A range has sizes at which the skip connections of this UNet do not meet.
        profile = ShapeProfile.static(width_px=width_px, height_px=height_px)
        profile.check_against(self.pixels_per_latent * unet_factor(self.config))

    def _fitted(self, inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        known = {tensor.name for tensor in self.session.spec.inputs}
        for name in inputs.keys() - known:
            _refuse("unet", name, inputs[name])
        if "timestep_cond" in known - inputs.keys():
            # Its projection has no bias: zeros are the same as the absent condition of torch.
            width = self.session.spec.input("timestep_cond").axes[1]
            inputs["timestep_cond"] = torch.zeros(rows, int(width), device=self.device)
        if missing := known - inputs.keys():
            raise UsageError(f"this UNet needs {' and '.join(sorted(missing))}, which the pipeline did not pass")
        return inputs


class EngineVAE(EngineModule):
    """`AutoencoderKL` over a decoder's session and, where the bundle has one, an encoder's."""

    def __init__(self, decoder: Session, encoder: Session | None, config: Config) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.sessions = (decoder,) if encoder is None else (decoder, encoder)
        self.config = _complete_config(diffusers.AutoencoderKL, config)
        self.pixels_per_latent = vae_factor(config)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: object = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents, already divided by the scaling factor, to pictures (rows, 3, height, width) of about -1 to
        1.
        """
        del generator
        check_picture_size(self.decoder, z, self.pixels_per_latent)
        sample = run_rows(self.decoder, {"latent_sample": z})["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures (rows, 3, height, width) of -1 to 1 to a distribution of latents, not yet scaled."""
        if self.encoder is None:
            raise UsageError(
                "this bundle has no VAE encoder, so it cannot start from a picture",
                hint="build it again with sdopt convert",
            )
        check_picture_size(self.encoder, x, 1)
        moments = run_rows(self.encoder, {"sample": x})["latent_parameters"]
        latents = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def enable_slicing(self) -> None:
        """Nothing: an engine already takes as many pictures at a time as it was built for."""

    disable_slicing = disable_tiling = enable_slicing

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Refused: a tile is another size than the one that the engine was built for."""
        if use_tiling:
            raise UsageError(
                "a VAE engine cannot work in tiles: it was built for one size",
                hint="build another bundle with sdopt convert --size",
            )


class EngineTextEncoder(EngineModule):
    """`CLIPTextModel`, or `CLIPTextModelWithProjection`, over a session.

    `final_norm` is (weight, bias) of the model's last layer norm: with clip_skip, pipelines apply it
    themselves.
    """

    def __init__(self, session: Session, config: Config, final_norm: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.session = session
        self.sessions = (session,)
        self.config = CLIPTextConfig.from_dict(dict(config))
        self.projects = has_projection(config)
        norm = torch.nn.LayerNorm(final_norm[0].shape[0], eps=self.config.layer_norm_eps)
        norm.load_state_dict({"weight": final_norm[0], "bias": final_norm[1]})
        self._final_norm = norm.requires_grad_(False).to(session.device)
        self.text_model = torch.nn.Module()
        self.text_model.final_layer_norm = norm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput | tuple[Any, ...]:
        """Token ids (rows, tokens) to the text's states (rows, tokens, width) and its pooled vector, fp32.

        Several chunks in a row, each with its own start and end, are encoded one by one and joined; the pooled vector
        is that of the first.
        """
        _refuse(self.session.spec.name, "attention_mask", attention_mask)
        _refuse(self.session.spec.name, "position_ids", position_ids)
        _refuse(self.session.spec.name, "output_attentions", output_attentions or None)
        outputs = run_in_chunks(self.session, input_ids)
        last = outputs["last_hidden_state"]
        states = self._hidden_states(outputs) if output_hidden_states else None
        result: BaseModelOutputWithPooling | CLIPTextModelOutput
        if self.projects:
            result = CLIPTextModelOutput(
                text_embeds=outputs["text_embeds"], last_hidden_state=last, hidden_states=states
            )
        else:
            result = BaseModelOutputWithPooling(
                last_hidden_state=last, pooler_output=outputs["pooler_output"], hidden_states=states
            )
        return result.to_tuple() if return_dict is False else result

    def _hidden_states(self, outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As transformers counts them: the embeddings, then the output of each layer, none of them
        normalised.

        The engine gives the last layer's only behind the final norm. It is given here standardised, the
        norm's weight and bias taken back: the final norm of it is `last_hidden_state`, as it is of torch's.
        """
        layers = int(self.config.num_hidden_layers)
        norm = self._final_norm
        weight = torch.where(norm.weight == 0, torch.ones_like(norm.weight), norm.weight)
        standardised = (outputs["last_hidden_state"] - norm.bias) / weight
        return (*(outputs[f"hidden_states.{layer}"] for layer in range(layers)), standardised)


def _complete_config(kind: Any, config: Config) -> FrozenDict:
    """The config with the defaults of the diffusers class, as diffusers itself completes an older file."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return FrozenDict({p.name: p.default for p in parameters if p.default is not p.empty} | dict(config))


def _refuse(network: str, argument: str, value: object) -> None:
    if value is not None:
        raise UsageError(
            f"{network}: the engine has no input for {argument}: its graph was traced without it",
            hint="use the torch pipeline for this, or merge the change into the checkpoint and build again",
        )


def _scalar(timestep: torch.Tensor | float) -> torch.Tensor:
    steps = torch.as_tensor(timestep, dtype=torch.float32)
    if steps.ndim == 0:
        # The way of every pipeline. Comparing values would make the host wait for a timestep that is on a GPU.
        return steps
    steps = steps.flatten()
    if not bool((steps == steps[0]).all()):
        raise UsageError("unet: the engine takes one timestep for all rows, not one for each")
    return steps[0]
