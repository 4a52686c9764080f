"""A bundle's folder to a pipeline: read the manifest, check what it names, open each engine, assemble."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

import diffusers

from sdopt import progress
from sdopt.backends.component_files import component_files
from sdopt.backends.open import open_session
from sdopt.bundle.damage import require_pipeline
from sdopt.bundle.linked import open_links
from sdopt.bundle.manifest import read_manifest
from sdopt.model.component import ComponentName
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.pipeline.modules.engine_module import EngineModule
from sdopt.preflight.runnable import require_runnable, require_sound, require_trusted


def load_pipeline(
    folder: str | PathLike[str], *, scheduler: str | None = None, trust_engines: Iterable[str] = ()
) -> diffusers.DiffusionPipeline:
    """Open a bundle; see `sdopt.load`. The engines stay open until `close_engines`, or until the process ends.

    Raises `ArtifactError` for a folder that is not a bundle or a damaged one, `UnsafeInputError` for a graph that
    names files elsewhere and for plans that nobody vouched for, `UsageError` for a scheduler that does not fit, and
    `EnvironmentMissingError` where this machine cannot run it.
    """
    path = open_links(Path(folder))
    manifest = read_manifest(path)
    require_pipeline(path, manifest)
    require_sound(path, manifest)
    require_trusted(path, manifest, trust_engines)
    plans = require_runnable(path, manifest)
    order = [name for name in ComponentName if name in manifest.components]
    with ExitStack() as opened:
        sessions = {}
        for count, name in enumerate(order):
            progress.update(f"opening {name}", count / len(order))
            files = component_files(path, manifest, name, plans.get(name, ()))
            settings = manifest.components[name].backend
            sessions[name] = opened.enter_context(open_session(files, settings))
        pipe = assemble_pipeline(path, manifest, sessions, scheduler=scheduler)
        opened.pop_all()
    return pipe


def close_engines(pipe: diffusers.DiffusionPipeline) -> None:
    """Free the engines of a pipeline, which cannot draw any more."""
    for part in pipe.components.values():
        if isinstance(part, EngineModule):
            part.close()
