"""What a loaded pipeline remembers of the bundle that it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdopt.bundle.manifest import BundleManifest
from sdopt.disk.files import hash_file
from sdopt.errors import UsageError
from sdopt.model.file_names import MANIFEST_NAME


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle's folder and manifest, and the scheduler config that the checkpoint came with."""

    folder: Path
    manifest: BundleManifest
    scheduler_config: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest as it was written, which names the digest of every other file.

        Not of `manifest`: one of an older schema reads as another table with every version of sdopt.
        """
        path = self.folder / MANIFEST_NAME
        return hash_file(path) if path.is_file() else hashlib.sha256(self.manifest.to_json()).hexdigest()


def opened_bundle(pipe: Any) -> OpenedBundle:
    """The bundle of a pipeline, also of one that diffusers made from its components.

    Raises `UsageError` for a pipeline that sdopt did not load.
    """
    bundle = getattr(pipe.unet, "bundle", None)
    if not isinstance(bundle, OpenedBundle):
        raise UsageError("this pipeline was not loaded from a bundle", hint="load one with sdopt.load(folder)")
    return bundle
