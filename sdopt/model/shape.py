"""Shapes that an engine is built for. Static is min = opt = max."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdopt.errors import ShapeError

CHUNK_TOKENS = 77
"""What CLIP takes at a time. A longer prompt is several such chunks, which only the UNet sees side by side."""

MOST_CHUNKS = 8
"""Chunks of the longest prompt that a bundle can be built for."""


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

    def clamp(self, size: int) -> int:
        """The nearest size inside."""
        return min(max(size, self.min), self.max)

    @classmethod
    def covering(cls, extents: Sequence[Extent]) -> Extent:
        """The smallest extent that contains all of them; the usual size is that of the first."""
        return cls(min(e.min for e in extents), extents[0].opt, max(e.max for e in extents))


@dataclass(frozen=True)
class ShapeProfile:
    """What one engine takes: pictures a run, pixels, and the tokens of a prompt as the UNet sees them."""

    batch: Extent
    height_px: Extent
    width_px: Extent
    tokens: Extent = Extent(CHUNK_TOKENS, CHUNK_TOKENS, CHUNK_TOKENS)
    unguided: bool = False
    """Whether the UNet also runs on the pictures alone, as drawings without guidance need: half the work. Without it,
    as in bundles of before schema 8, it always runs on two rows a picture."""

    @classmethod
    def static(cls, *, height_px: int, width_px: int, batch: int = 1, tokens: int = 77) -> ShapeProfile:
        batches, heights, widths, lengths = map(Extent.static, (batch, height_px, width_px, tokens))
        return cls(batches, heights, widths, lengths)

    @classmethod
    def covering(cls, profiles: Sequence[ShapeProfile]) -> ShapeProfile:
        """The smallest profile that contains all of them; its usual sizes are those of the first."""
        columns = zip(*((p.batch, p.height_px, p.width_px, p.tokens) for p in profiles), strict=True)
        batch, height_px, width_px, tokens = map(Extent.covering, columns)
        return cls(batch, height_px, width_px, tokens, unguided=all(p.unguided for p in profiles))

    @property
    def is_static(self) -> bool:
        return all(e.is_static for e in (self.batch, self.height_px, self.width_px, self.tokens))

    @property
    def size_text(self) -> str:
        """`512x512`, or `512x512..1024x1024`: as it is written after `--size`."""
        return write_size(self.width_px, self.height_px)

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """The prompt lengths that the UNet takes, in chunks: 1 is 77 tokens, 3 is 231."""
        return tuple(range(self.tokens.min // CHUNK_TOKENS, self.tokens.max // CHUNK_TOKENS + 1))

    @property
    def unet_rows(self) -> tuple[Extent, ...]:
        """What the UNet takes at a time: two rows a picture, and also one, each static where the batch is."""
        guided = self.batch.scaled(2)
        if not self.unguided:
            return (guided,)
        return (guided, self.batch) if self.batch.is_static else (Extent(self.batch.min, guided.opt, guided.max),)

    def axis_extents(self, vae_factor: int) -> dict[str, Extent]:
        """Size of every named axis that `ComponentSpec` uses. `vae_factor` is pixels per latent element.

        The UNet sees each picture twice (with and without the prompt) for classifier-free guidance, and where the
        profile is `unguided` also once: `cfg_batch`.
        `tokens` is what the text encoders take, always one chunk; `prompt_tokens` is what the UNet takes.
        """
        return {
            "batch": self.batch,
            "cfg_batch": Extent.covering(self.unet_rows),
            "height": self.height_px,
            "width": self.width_px,
            "latent_height": self.height_px.scaled(1, vae_factor),
            "latent_width": self.width_px.scaled(1, vae_factor),
            "tokens": Extent.static(CHUNK_TOKENS),
            "prompt_tokens": self.tokens,
        }

    def check_against(self, multiple_px: int) -> None:
        """Raise `ShapeError` unless every bound is a multiple of `multiple_px` (VAE factor times UNet factor)."""
        wrong = {
            side: bound
            for side, extent in (("width", self.width_px), ("height", self.height_px))
            for bound in (extent.max, extent.opt, extent.min)
            if bound % multiple_px
        }
        if wrong:
            named = " and ".join(f"the {side} of {bound} px" for side, bound in wrong.items())
            are = "is not a multiple" if len(wrong) == 1 else "are not multiples"
            raise ShapeError(
                f"{named} {are} of {multiple_px}, which this model needs",
                hint="; ".join(_name_nearest(side, bound, multiple_px) for side, bound in wrong.items()),
            )


def _name_nearest(side: str, size_px: int, multiple_px: int) -> str:
    low = size_px // multiple_px * multiple_px
    high = low + multiple_px
    return f"the nearest {side}s are {low} and {high}" if low else f"the least {side} is {high}"


def describe_profiles(profiles: Sequence[ShapeProfile]) -> str:
    """What a bundle draws, for people: `512x512 and 768x512 px, batch 1, prompts of 77 or 154 tokens`."""
    first = profiles[0]
    sizes = dict.fromkeys(profile.size_text for profile in profiles)
    batch = str(first.batch.max) if first.batch.is_static else f"{first.batch.min} to {first.batch.max}"
    tokens = " or ".join(str(CHUNK_TOKENS * count) for count in first.chunk_counts)
    return f"{' and '.join(sizes)} px, batch {batch}, prompts of {tokens} tokens"


def nearest_profile(profiles: Sequence[Mapping[str, Extent]], sizes: Mapping[str, int]) -> Mapping[str, Extent]:
    """The profile nearest to the given axis sizes; ties go to the first.

    Distances are of logarithms, so that twice as wide is as far as half as wide. Of two axes, width and height, that
    ranks as the differences of area and of aspect do together.
    """

    def distance(profile: Mapping[str, Extent]) -> float:
        ratios = (size / profile[axis].clamp(size) for axis, size in sizes.items())
        # Rounded, because logarithms of a ratio and of its inverse differ in their last bit.
        return round(math.hypot(*map(math.log, ratios)), 9)

    return min(profiles, key=distance)


_SIZE = re.compile(r"^(\d{1,5})x(\d{1,5})$")


def parse_size(text: str) -> tuple[int, int]:
    """`'512x768'` as (width_px, height_px), the order that pictures are named in."""
    match = _SIZE.match(text.strip().lower())
    if match is None:
        raise ShapeError(f"{text!r} is not WIDTHxHEIGHT in pixels", hint="for example --size 512x512")
    width_px, height_px = int(match[1]), int(match[2])
    if not (width_px and height_px):
        raise ShapeError(f"{text!r} has a side of 0 pixels", hint="for example --size 512x512")
    return width_px, height_px


def write_size(width_px: Extent, height_px: Extent) -> str:
    """What `--size` takes: `512x512`, or `512x512..1024x1024`."""
    least, most = f"{width_px.min}x{height_px.min}", f"{width_px.max}x{height_px.max}"
    return least if least == most else f"{least}..{most}"


def parse_sizes(text: str, usual: tuple[int, int]) -> tuple[tuple[Extent, Extent], ...]:
    """The sizes of a recipe as (width, height) extents in pixels, one for each profile.

    `'512x512'` is one static size, `'512x512,768x512'` are two, `'512x512..1024x1024'` is a range and
    `'512x512..768x768..1024x1024'` one whose usual size is in the middle; `usual` (width, height) is the usual size of
    a range that names none, where it lies inside, else the largest is. Raises `ShapeError`.
    """
    sizes = tuple(_parse_range(part.strip(), usual) for part in text.split(","))
    if len(set(sizes)) != len(sizes):
        raise ShapeError(f"{text!r} names the same size twice")
    return sizes


def _parse_range(text: str, usual: tuple[int, int]) -> tuple[Extent, Extent]:
    bounds = [parse_size(part) for part in text.split("..")]
    if len(bounds) > 3:
        raise ShapeError(f"{text!r} has too many bounds", hint="write --size 512x512..768x768..1024x1024")
    if any(list(sides) != sorted(sides) for sides in zip(*bounds, strict=True)):
        raise ShapeError(
            f"{text!r} does not go from the smallest to the largest", hint="for example --size 512x512..1024x1024"
        )
    least, most = bounds[0], bounds[-1]
    if len(bounds) == 3:
        middle = bounds[1]
    else:
        inside = all(low <= side <= high for low, side, high in zip(least, usual, most, strict=True))
        middle = usual if inside else most
    width_px, height_px = (Extent(*sides) for sides in zip(least, middle, most, strict=True))
    return width_px, height_px
