"""`bundle.json`: what a bundle is, where it came from, and what was proven of it.

The format is an API: `schema_version` counts its changes, unknown keys are refused, each defect has its own message.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdopt.artifacts.files import resolve_inside, write_file
from sdopt.errors import ArtifactError, ShapeError
from sdopt.model.component import ComponentName, ComponentSpec, Config
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import Precision
from sdopt.model.recipe import BackendSettings, BuildRecipe, Dialect
from sdopt.model.shape import ShapeProfile

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
_LIMIT_BYTES = 16 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class SourceRecord(_Record):
    """Where the weights came from. `digest` is over the weight files of the bundle, whatever files they came from."""

    kind: Literal["huggingface", "diffusers", "single-file"]
    location: str
    revision: str = ""
    digest: str = ""
    licence: str = ""


class OutputParity(_Record):
    """One output against torch fp32: largest absolute difference, |a-b|/|b|, and 1 - cosine."""

    name: str
    max_abs: float
    relative_l2: float
    cosine_distance: float


class ParityRecord(_Record):
    passed: bool
    runtime: str
    outputs: tuple[OutputParity, ...]
    relative_l2_limit: float
    cosine_distance_limit: float


class GraphAudit(_Record):
    """What the graph says of itself: counts of ONNX nodes, and the attention layers that torch has."""

    opset: int
    nodes: int
    attention_nodes: int
    attention_layers: int


class ComponentRecord(_Record):
    spec: ComponentSpec
    precision: Precision
    backend: BackendSettings
    architecture: str
    """Digest of config, shapes, graph type and dialect: the graph is the same where this is the same."""
    weights_key: str
    """Digest of the source files' names, sizes and times, and of the storage types: tells whether to copy again."""
    audit: GraphAudit
    parity: ParityRecord | None = None


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, no password
    FAIL = "fail"
    NOT_VERIFIED = "not verified"


class ImageFidelity(_Record):
    """One picture of the engines against torch fp32 from the same initial latents.

    PSNR in dB (null for equal pictures), SSIM and MS-SSIM in [0, 1], the least cosine of the latents over the steps.
    """

    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    ms_ssim: float
    latent_cosine_min: float
    noise_floor_psnr_db: float | None
    noise_floor_ssim: float


class FidelityRecord(_Record):
    verdict: Verdict
    reason: str
    scheduler: str = ""
    steps: int = 0
    guidance_scale: float = 0.0
    images: tuple[ImageFidelity, ...] = ()


class EnvironmentRecord(_Record):
    """The machine and libraries that made the bundle; `cpu_features` are those that the engines' precision needs."""

    sdopt: str
    python: str
    system: str
    processor: str
    cpu_features: tuple[str, ...]
    libraries: dict[str, str]


class BundleManifest(_Record):
    schema_version: Literal[1] = 1
    name: str
    created_utc: str
    family: Family
    prediction: Prediction
    inpainting: bool
    source: SourceRecord
    recipe: BuildRecipe
    profile: ShapeProfile
    dialect: Dialect
    components: dict[ComponentName, ComponentRecord]
    files: dict[str, FileRecord]
    fidelity: FidelityRecord
    environment: EnvironmentRecord

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> BundleManifest:
    """Read and check `bundle.json`; the files that it names are not read (`sdopt check` does that).

    Raises `ArtifactError` for a folder without one, for a newer schema, and for unknown or missing keys.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no sdopt bundle: it has no {MANIFEST_NAME}",
            hint=f"make one with: sdopt convert MODEL -o {folder}",
        )
    if path.stat().st_size > _LIMIT_BYTES:
        raise ArtifactError(f"{path} is larger than any manifest")
    try:
        values: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="build the bundle again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {version}, and this sdopt reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade sdopt",
        )
    try:
        manifest = BundleManifest.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{path}: {'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}", hint="build the bundle again"
        ) from error
    except ShapeError as error:
        raise ArtifactError(f"{path}: profile: {error.message}", hint="build the bundle again") from error
    for relative in manifest.files:
        resolve_inside(folder, relative)
    return manifest


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    write_file(folder / MANIFEST_NAME, manifest.to_json())


def read_config(folder: Path, component: ComponentName) -> Config:
    """The diffusers or transformers config of a component of a bundle."""
    path = folder / component / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", hint="sdopt check names every damaged file") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is no table")
    return config
