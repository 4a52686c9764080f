"""`bundle.json`: what a bundle is, where it came from, and what was proven of it.

The format is an API: `schema_version` counts its changes, unknown keys are refused, each defect has its own message.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sdopt.bundle.records import BuildRecord, ComponentRecord, FidelityRecord, SourceRecord
from sdopt.disk.digest import FileRecord, Record
from sdopt.disk.files import resolve_inside, write_file
from sdopt.errors import ArtifactError, ShapeError
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.model.component import ComponentName, Config, vae_factor
from sdopt.model.family import Family, Prediction
from sdopt.model.file_names import CARD_NAME, CONFIG_NAME, MANIFEST_NAME
from sdopt.model.recipe import BuildRecipe, Dialect
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.model.task import PIPELINE_CLASSES, Task, find_tasks

SCHEMA_VERSION = 8
_LIMIT_BYTES = 16 << 20

_CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class BundleKind(StrEnum):
    """What a bundle's engines are. Only a pipeline draws by itself."""

    PIPELINE = "pipeline"
    CONTROLNET = "controlnet"
    VAE = "vae"
    UPSCALER = "upscaler"
    SAFETY = "safety"

    @property
    def label(self) -> str:
        return {
            BundleKind.PIPELINE: "a whole pipeline", BundleKind.CONTROLNET: "a ControlNet", BundleKind.VAE: "a VAE",
            BundleKind.UPSCALER: "an upscaler", BundleKind.SAFETY: "a safety checker",
        }[self]  # fmt: skip


class BundleManifest(Record):
    schema_version: Literal[8] = 8
    kind: BundleKind = BundleKind.PIPELINE
    name: str
    created_utc: str
    family: Family
    prediction: Prediction
    tasks: tuple[Task, ...]
    """What can be drawn with it, what it was made for first. A pipeline has at least one."""
    pixels_per_latent: int | None = Field(default=None, ge=1)
    """Pixels along a side for one element of the latents. Null where the kind has nothing to do with a VAE."""
    source: SourceRecord
    recipe: BuildRecipe
    profile: ShapeProfile
    """The smallest that contains all of `profiles`; its usual sizes are those of the first."""
    profiles: tuple[ShapeProfile, ...] = Field(min_length=1)
    dialect: Dialect
    components: dict[ComponentName, ComponentRecord]
    files: dict[str, FileRecord]
    fidelity: FidelityRecord
    environment: EnvironmentRecord
    build: BuildRecord | None = None
    """Null in bundles of before schema 4."""

    @property
    def engine_files(self) -> dict[str, FileRecord]:
        """The files that engines need: all but the card, which is for people and may be edited."""
        return {name: record for name, record in self.files.items() if name != CARD_NAME}

    @property
    def own_task(self) -> Task:
        """What the bundle's own pipeline does. Raises `ArtifactError` for a bundle that draws nothing."""
        if not self.tasks:
            raise ArtifactError(f"{self.name} is {self.kind.label}, and draws nothing by itself")
        return self.tasks[0]

    @property
    def extents(self) -> Mapping[str, Extent]:
        """Sizes of the named axes of every component, over all profiles. Raises as `require_pixels_per_latent`."""
        return self.profile.axis_extents(self.require_pixels_per_latent())

    @property
    def profile_extents(self) -> tuple[Mapping[str, Extent], ...]:
        """The same for each of the profiles, in their order."""
        factor = self.require_pixels_per_latent()
        return tuple(profile.axis_extents(factor) for profile in self.profiles)

    def require_component(self, name: ComponentName) -> ComponentRecord:
        """Raises `ArtifactError` where the bundle lacks it."""
        if name not in self.components:
            raise ArtifactError(f"{self.name} is not a whole pipeline: it lacks {name}")
        return self.components[name]

    def require_pixels_per_latent(self) -> int:
        """Raises `ArtifactError` where the manifest does not say it."""
        if self.pixels_per_latent is None:
            raise ArtifactError(f"{self.name} is not a whole pipeline: it does not say how large its latents are")
        return self.pixels_per_latent

    @model_validator(mode="after")
    def _draws_what_its_family_knows(self) -> Self:
        if self.kind is BundleKind.PIPELINE and not self.tasks:
            raise ValueError("tasks: a pipeline has at least one")
        if unknown := [task for task in self.tasks if task not in PIPELINE_CLASSES[self.family]]:
            raise ValueError(f"tasks: {self.family} has no {', '.join(unknown)}")
        return self

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def _lost(folder: Path) -> str:
    """The recipe is in the file that cannot be read, so `--again` cannot help."""
    command = shlex.join(["sdopt", "convert", "MODEL", "-o", str(folder)])
    return f"its recipe cannot be read, so name the model again: {command}"


def read_manifest(folder: Path) -> BundleManifest:
    """Read and check `bundle.json`; the files that it names are not read (`sdopt check` does that).

    Raises `ArtifactError` for a folder without one, for a newer schema, and for unknown or missing keys, and
    `UnsafeInputError` for a file that is a link or lies elsewhere.
    """
    manifest = parse_manifest(folder)
    for relative in manifest.files:
        resolve_inside(folder, relative)
    if manifest.kind is BundleKind.PIPELINE and manifest.pixels_per_latent is None:
        return manifest.model_copy(update={"pixels_per_latent": _find_pixels_per_latent(folder)})
    return manifest


def _find_pixels_per_latent(folder: Path) -> int | None:
    """By the VAE's config: manifests of before schema 6 do not say it. None where that is missing or damaged, which is
    for whoever compares the files with the manifest to say.
    """
    resolve_inside(folder, f"{ComponentName.VAE_DECODER}/{CONFIG_NAME}")
    try:
        return vae_factor(read_config(folder, ComponentName.VAE_DECODER)) or None
    except (ArtifactError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def parse_manifest(folder: Path) -> BundleManifest:
    """`bundle.json` by itself, whatever the files are that it names."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise _not_a_bundle(folder)
    if path.stat().st_size > _LIMIT_BYTES:
        raise ArtifactError(f"{path} is larger than any manifest")
    try:
        values: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint=_lost(folder)) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {version}, and this sdopt reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade sdopt",
        )
    if version == 1:
        values = _migrate_1(values)
    if version in (1, 2, 3, 4, 5):
        values = _migrate_5(values)
    if version in (1, 2, 3, 4, 5, 6, 7):
        # 3 added quantisation, 4 the build's time, 5 `ema`, 6 the kind, the tasks and the size of the latents, 7 LoRA
        # slots, adapters in the weights, and prompts of more than three chunks, 8 words from outside and UNets that run
        # without guidance
        values = {**values, "schema_version": SCHEMA_VERSION}
    try:
        manifest = BundleManifest.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{path}: {'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}", hint=_lost(folder)
        ) from error
    except ShapeError as error:
        raise ArtifactError(f"{path}: profile: {error.message}", hint=_lost(folder)) from error
    return manifest


def _not_a_bundle(folder: Path) -> ArtifactError:
    """What the folder is instead, and a command that makes a bundle where convert may write one."""
    if (folder / "model_index.json").is_file() or (folder.is_file() and folder.suffix in _CHECKPOINT_SUFFIXES):
        # Not into the checkpoint: convert writes to a folder of its own.
        output = Path("engines") / (folder.stem if folder.is_file() else folder.resolve().name)
        return ArtifactError(
            f"{folder} is a checkpoint, and not a bundle of engines",
            hint=f"make the bundle with: {shlex.join(['sdopt', 'convert', str(folder), '-o', str(output)])}",
        )
    # `.` has no parent by its name, and the parent of `unet` would be `.`, which is not what the user calls it.
    above = folder.parent if folder.parent != Path() else folder.absolute().parent
    if folder.is_dir() and (above / MANIFEST_NAME).is_file():
        return ArtifactError(
            f"{folder} is a part of a bundle, and not all of it", hint=f"give the folder above, {above}"
        )
    free = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    output = folder if free else Path("engines") / "MODEL"
    return ArtifactError(
        f"{folder} is not an sdopt bundle: it has no {MANIFEST_NAME}",
        hint=f"make one with: {shlex.join(['sdopt', 'convert', 'MODEL', '-o', str(output)])}",
    )


def _migrate_1(values: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 knew one profile and no plans."""
    profiles = [values["profile"]] if "profile" in values else []
    return {**values, "profiles": profiles}


def _migrate_5(values: dict[str, Any]) -> dict[str, Any]:
    """Until schema 5 every bundle was a pipeline, and `inpainting` and the family stood for its tasks."""
    kept = {key: value for key, value in values.items() if key != "inpainting"}
    inpainting, family = values.get("inpainting"), values.get("family")
    if not isinstance(inpainting, bool) or family not in list(Family):
        return kept  # what is missing is named where the manifest is validated
    return {**kept, "tasks": find_tasks(Family(family), 9 if inpainting else 4, 4)}


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    write_file(folder / MANIFEST_NAME, manifest.to_json())


def read_config(folder: Path, component: ComponentName) -> Config:
    """The diffusers or transformers config of a component of a bundle."""
    path = folder / component / CONFIG_NAME
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ArtifactError(f"{path} is larger than any config")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", hint="sdopt check names every damaged file") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a table")
    return config
