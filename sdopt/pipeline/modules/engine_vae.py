"""`AutoencoderKL` over engine sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from sdopt.bundle.again import variant_command
from sdopt.errors import UsageError
from sdopt.model.component import Config, vae_factor
from sdopt.pipeline.batches import run_rows
from sdopt.pipeline.finite import require_finite
from sdopt.pipeline.modules.engine_module import EngineModule, complete_config
from sdopt.pipeline.sizes import check_picture_size

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session


class EngineVAE(EngineModule):
    """`AutoencoderKL` over a decoder's session and, where the bundle has one, an encoder's."""

    def __init__(self, decoder: Session, encoder: Session | None, config: Config) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.sessions = (decoder,) if encoder is None else (decoder, encoder)
        self.config = complete_config(diffusers.AutoencoderKL, config)
        self.pixels_per_latent = vae_factor(config)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: object = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents, already divided by the scaling factor, to pictures (rows, 3, height, width) of about -1 to 1.

        Raises `DrawingError` for latents or pictures with NaN or infinity.
        """
        del generator
        check_picture_size(self.decoder, z, self.pixels_per_latent)
        sample = run_rows(self.decoder, {"latent_sample": z})["sample"]
        if self.refuses_nonfinite:
            require_finite(z, "the scheduler gave latents with")
            require_finite(sample, "the vae decoder gave")
        else:
            # Pipelines clamp to 0 and 1, which would make a white pixel of infinity.
            sample = torch.where(sample.isfinite(), sample, torch.nan)
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
                hint=f"build another: {variant_command('--size WxH')}",
            )
