"""NaN and infinity stop a drawing: a picture of them would be black or white, and look like a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sdopt.errors import DrawingError

_HINT = "try another --scheduler or other --steps; if it stays, convert again with --precision fp32"


def require_finite(value: torch.Tensor, what: str) -> None:
    """Raise `DrawingError` unless every element is a number. On a GPU the host waits for the tensor."""
    if not bool(torch.isfinite(value).all()):
        raise DrawingError(f"{what} NaN or infinity, so there is no picture", hint=_HINT)


def require_finite_output(result: Any) -> None:
    """The same for what a pipeline gives: pictures as arrays or tensors, or latents. PIL pictures have no NaN."""
    images = result[0] if isinstance(result, tuple) else getattr(result, "images", None)
    for image in images if isinstance(images, (list, tuple)) else (images,):
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            require_finite(torch.from_numpy(image), "the drawing gave")
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            require_finite(image, "the drawing gave")
