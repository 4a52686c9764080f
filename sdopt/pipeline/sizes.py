"""Whether an engine was built for a picture of some size, said in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.bundle.again import variant_command
from sdopt.errors import ShapeError
from sdopt.model.shape import nearest_profile, write_size

if TYPE_CHECKING:
    import torch

    from sdopt.backends.protocol import Session

# For a network whose own is not known: 8 pixels per latent element, halved three times on the way down.
_MULTIPLE_PX = 64


def check_picture_size(session: Session, value: torch.Tensor, pixels_per_element: int) -> None:
    """Refuse a picture or latent (rows, channels, height, width) that the engine was not built for."""
    height_px, width_px = (side * pixels_per_element for side in value.shape[2:])
    require_size(session, width_px, height_px, pixels_per_element)


def require_size(
    session: Session, width_px: int, height_px: int, pixels_per_element: int, *, multiple_px: int = _MULTIPLE_PX,
    folder: Path | None = None,
) -> None:  # fmt: skip
    """Raise a `ShapeError` that names the profiles of the engine, and the nearest, unless one takes this size.

    `multiple_px` is what both sides of a picture have to be a multiple of, for a bundle that could take it;
    `folder` is the bundle's, for the command that builds one.
    """
    height, width = (str(axis) for axis in session.spec.inputs[0].axes[2:])
    built = [{axis: table[axis].scaled(pixels_per_element) for axis in (width, height)} for table in session.profiles]
    if any(width_px in table[width] and height_px in table[height] for table in built):
        return
    names = list(dict.fromkeys(write_size(table[width], table[height]) for table in built))
    span = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(names) > 1:
        near = nearest_profile(built, {width: width_px, height: height_px})
        span += f"; the nearest is {write_size(near[width], near[height])}"
    possible = "x".join(str(max(1, round(side / multiple_px)) * multiple_px) for side in (width_px, height_px))
    raise ShapeError(
        f"a picture of {width_px}x{height_px} px: {session.spec.name} was built for {span}",
        hint=f"draw at the bundle's own size, or build another: {variant_command(f'--size {possible}', folder)}",
    )
