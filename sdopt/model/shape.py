"""Shapes that an engine is built for. Static is min = opt = max."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdopt.errors import ShapeError


@dataclass(frozen=True)
class Extent:
    """Smallest, usual and largest size of one axis, in elements."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ShapeError(f"extent must be 1 <= min <= opt <= max, not {self.min}, {self.opt}, {self.max}")

    @classmethod
    def static(cls, size: int) -> Extent:
        return cls(size, size, size)

    @property
    def is_static(self) -> bool:
        return self.min == self.max

    def scaled(self, numerator: int, denominator: int = 1) -> Extent:
        """Every bound times numerator / denominator (exact: the caller has checked divisibility)."""
        return Extent(*(bound * numerator // denominator for bound in (self.min, self.opt, self.max)))

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True)
class ShapeProfile:
    """What one engine takes: pictures a run, pixels, prompt tokens. `dynamic` keeps the axes symbolic in the graph."""

    batch: Extent
    height_px: Extent
    width_px: Extent
    tokens: Extent = Extent(77, 77, 77)

    @classmethod
    def static(cls, *, height_px: int, width_px: int, batch: int = 1, tokens: int = 77) -> ShapeProfile:
        return cls(*map(Extent.static, (batch, height_px, width_px, tokens)))

    @property
    def is_static(self) -> bool:
        return all(e.is_static for e in (self.batch, self.height_px, self.width_px, self.tokens))

    def axis_extents(self, vae_factor: int) -> dict[str, Extent]:
        """Size of every named axis that `ComponentSpec` uses. `vae_factor` is pixels per latent element.

        The UNet sees each picture twice (with and without the prompt) for classifier-free guidance: `cfg_batch`.
        """
        return {
            "batch": self.batch,
            "cfg_batch": self.batch.scaled(2),
            "height": self.height_px,
            "width": self.width_px,
            "latent_height": self.height_px.scaled(1, vae_factor),
            "latent_width": self.width_px.scaled(1, vae_factor),
            "tokens": self.tokens,
        }

    def check_against(self, multiple_px: int) -> None:
        """Raise `ShapeError` unless every bound is a multiple of `multiple_px` (VAE factor times UNet factor)."""
        for side, extent in (("height", self.height_px), ("width", self.width_px)):
            for bound in (extent.min, extent.opt, extent.max):
                if bound % multiple_px:
                    low = max(multiple_px, bound // multiple_px * multiple_px)
                    raise ShapeError(
                        f"{side} {bound} px is not a multiple of {multiple_px}, which this model needs",
                        hint=f"the nearest sizes are {low} and {low + multiple_px if low < bound else low}",
                    )


_SIZE = re.compile(r"^(\d{1,5})x(\d{1,5})$")


def parse_size(text: str) -> tuple[int, int]:
    """`'512x768'` as (width_px, height_px), the order that pictures are named in."""
    match = _SIZE.match(text.strip().lower())
    if match is None:
        raise ShapeError(f"size {text!r} is not WIDTHxHEIGHT in pixels", hint="for example --size 512x512")
    width_px, height_px = int(match[1]), int(match[2])
    if not (width_px and height_px):
        raise ShapeError(f"size {text!r} has a side of 0 pixels")
    return width_px, height_px
