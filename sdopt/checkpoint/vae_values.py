"""The numbers of a VAE's config that no tensor depends on, and every picture does."""

from __future__ import annotations

import math

from sdopt.errors import CheckpointError
from sdopt.model.component import Config


def require_latent_scale(config: Config, where: str) -> None:
    """Raise `CheckpointError` where the VAE's scale or shift of the latents is not a number that can be computed with.

    What is missing is left to diffusers' default.
    """
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _is_finite(scale) or scale == 0:
        raise _error(where, "scaling_factor", scale, "a finite number other than 0")
    if shift is not None and not _is_finite(shift):
        raise _error(where, "shift_factor", shift, "a finite number")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _error(where: str, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{where}/config.json has {key}={value!r}, which should be {wanted}",
        hint="download it again, or give another VAE with --vae",
    )
