"""sdopt turns any Stable Diffusion checkpoint into engines that are proven faster and to draw the same picture.

`sdopt.load(folder)` opens a bundle that `sdopt convert` made. Importing sdopt loads no heavy library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdopt._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from sdopt.model.request import DrawRequest

__all__ = ["__version__", "draw", "load"]


def load(
    folder: str | PathLike[str], *, scheduler: str | None = None, trust_engines: Iterable[str] = ()
) -> DiffusionPipeline:
    """Open a bundle as a real diffusers pipeline whose networks are engine sessions.

    `scheduler` is one of the names that `sdopt generate --help` lists; None keeps the bundle's own. `trust_engines` are
    SHA-256 of TensorRT plans, or of a `bundle.json`, that may be opened though they were not built here. Several
    threads may call the pipeline: their calls queue, and each gives what it gives alone. Raises
    `ArtifactError` for a folder that is not a valid bundle, `UnsafeInputError` for plans that nobody vouched for, and
    `EnvironmentMissingError` where this machine cannot run it.
    """
    from sdopt.pipeline.load import load_pipeline

    return load_pipeline(folder, scheduler=scheduler, trust_engines=trust_engines)


def draw(
    pipe: DiffusionPipeline,
    request: DrawRequest | Mapping[str, Any],
    *,
    lora_folders: Iterable[str | PathLike[str]] = (),
) -> Image:
    """Draw one picture with a pipeline of `load`: `sdopt.draw(pipe, {"prompt": "a red circle", "seed": 7})`.

    `request` has the fields of a request in `sdopt.model.request`; the same one on the same bundle and machine gives
    the same picture. LoRAs that it names, also in its prompt, are looked for in `lora_folders`. Safe to call from
    several threads. Raises `UsageError` for a request that cannot be drawn, prompt syntax that would be drawn as words
    among them, `AdapterError` for a LoRA that is not there or does not fit, `ShapeError` for a size not built for, and
    `DrawingError` where the picture would have NaN or infinity.
    """
    from pathlib import Path

    from sdopt.model.request import parse_request
    from sdopt.tasks.draw import draw_picture
    from sdopt.tasks.loras import LoraFinder

    finder = LoraFinder([Path(folder) for folder in lora_folders])
    return draw_picture(pipe, parse_request(request) if isinstance(request, Mapping) else request, loras=finder)
