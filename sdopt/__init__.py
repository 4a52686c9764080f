"""sdopt turns any Stable Diffusion checkpoint into engines that are proven faster and to draw the same picture.

`sdopt.load(folder)` opens a bundle that `sdopt convert` made. Importing sdopt loads no heavy library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdopt._version import __version__

if TYPE_CHECKING:
    from os import PathLike

    from diffusers import DiffusionPipeline

__all__ = ["__version__", "load"]


def load(folder: str | PathLike[str], *, scheduler: str | None = None) -> DiffusionPipeline:
    """Open a bundle as a real diffusers pipeline whose networks are engine sessions.

    `scheduler` is one of the names that `sdopt generate --help` lists; None keeps the bundle's own. Raises
    `ArtifactError` for a folder that is no valid bundle, `EnvironmentMissingError` where this machine cannot run it.
    """
    from sdopt.pipeline.load import load_pipeline

    return load_pipeline(folder, scheduler=scheduler)
