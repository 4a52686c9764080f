"""What a loaded pipeline remembers of the bundle that it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import UsageError


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle's folder and manifest, and the scheduler config that the checkpoint came with."""

    folder: Path
    manifest: BundleManifest
    scheduler_config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names the digest of every other file."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()


def opened_bundle(pipe: Any) -> OpenedBundle:
    """The bundle of a pipeline, also of one that diffusers made from its components.

    Raises `UsageError` for a pipeline that sdopt did not load.
    """
    bundle = getattr(pipe.unet, "bundle", None)
    if not isinstance(bundle, OpenedBundle):
        raise UsageError("this pipeline was not loaded from a bundle", hint="load one with sdopt.load(folder)")
    return bundle
