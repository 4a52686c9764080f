"""sdopt turns any Stable Diffusion checkpoint into engines that are proven faster and to draw the same picture.

`sdopt.load(folder)` opens a bundle that `sdopt convert` made. Importing sdopt loads no heavy library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdopt._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from diffusers import DiffusionPipeline

__all__ = ["__version__", "load"]


def load(
    folder: str | PathLike[str], *, scheduler: str | None = None, trust_engines: Iterable[str] = ()
) -> DiffusionPipeline:
    """Open a bundle as a real diffusers pipeline whose networks are engine sessions.

    `scheduler` is one of the names that `sdopt generate --help` lists; None keeps the bundle's own. `trust_engines` are
    SHA-256 of TensorRT plans, or of a `bundle.json`, that may be opened though they were not built here. Raises
    `ArtifactError` for a folder that is no valid bundle, `UnsafeInputError` for plans that nobody vouched for, and
    `EnvironmentMissingError` where this machine cannot run it.
    """
    from sdopt.pipeline.load import load_pipeline

    return load_pipeline(folder, scheduler=scheduler, trust_engines=trust_engines)
