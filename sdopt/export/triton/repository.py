"""`sdopt export triton`: a bundle as a Triton model repository.

One model for each network, and one named as the bundle that draws: it holds the denoising loop, in Triton's Python
backend, and asks the others through Triton itself (business logic scripting).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from sdopt import progress
from sdopt.bundle.again import variant_command
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import PlanRecord
from sdopt.disk.files import write_file
from sdopt.errors import UsageError
from sdopt.export.published_folder import copy_file, open_bundle, staged, sum_bytes
from sdopt.export.triton.config import ModelConfig, TritonBackend, configure_network, configure_pipeline, quote
from sdopt.export.triton.settings import make_settings, require_text_to_image, write_tokenizers
from sdopt.model.component import ComponentName
from sdopt.model.file_names import GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.shape import Extent
from sdopt.preflight.runnable import require_trusted

_VERSION = "1"
_GRAPH_FILES = (GRAPH_NAME, WEIGHTS_NAME)
_PIPELINE_FILES = {"pipeline.py": "model.py", "drawing.py": "drawing.py", "schedules.py": "schedules.py"}
_GENERATION = re.compile(r"sm([1-9]\d?)(\d)")


@dataclass(frozen=True)
class TritonExport:
    """What was written: the model that draws, the networks that it asks, and what the server must have for it."""

    folder: Path
    backend: TritonBackend
    model: str
    networks: tuple[str, ...]
    needs: tuple[str, ...]


def export_triton(
    folder: Path, output: Path, *, backend: str | None = None, name: str | None = None, scheduler: str | None = None
) -> TritonExport:
    """Write `output`, whole or not at all. `backend` None takes plans where the bundle has such as Triton loads.

    `name` is the model that draws, by default the bundle's; the networks are called after it. Raises `UsageError`
    for a bundle that cannot be served, `ArtifactError` for a damaged one, `UnsafeInputError` for unsafe names and for
    plans that nobody has said to trust.
    """
    manifest = open_bundle(folder)
    require_text_to_image(manifest)
    kind = _choose_backend(manifest, backend)
    if kind is TritonBackend.TENSORRT:
        # Triton runs what lies in its repository; here is the last place where a plan is looked at.
        require_trusted(folder, manifest)
    base = name or manifest.name
    quote(base)
    networks = [part for part in ComponentName if part in manifest.components and part is not ComponentName.VAE_ENCODER]
    models: dict[ComponentName, str] = {part: f"{base}_{part}" for part in networks}
    sources = {part: _list_files(manifest, part, kind) for part in networks}
    extents = _find_extents(manifest, kind)
    settings = make_settings(folder, manifest, models, extents, scheduler)
    needed_bytes = sum_bytes(manifest, (file for copied in sources.values() for file in copied.values()))
    with staged(output, "triton", manifest, needed_bytes) as growing:
        for count, part in enumerate(networks):
            progress.update(f"copying {part}", count / len(networks))
            target = growing / models[part]
            config = configure_network(
                target.name, manifest.components[part].spec, extents, kind, _name_plans(manifest, part, kind)
            )
            _write_model(target, config)
            for file, source in sources[part].items():
                copy_file(folder, source, target / _VERSION / file)
            if kind is TritonBackend.PYTHON:
                _copy_code("network.py", target / _VERSION / "model.py")
        height_px, width_px = manifest.profile.height_px.opt, manifest.profile.width_px.opt
        drawer = configure_pipeline(base, settings["latents"], height_px, width_px)
        _write_pipeline(folder, settings, drawer, growing / base)
    return TritonExport(output, kind, base, tuple(models.values()), _list_needs(manifest, kind))


def _choose_backend(manifest: BundleManifest, name: str | None) -> TritonBackend:
    if name is None:
        unet = manifest.require_component(ComponentName.UNET)
        return TritonBackend.TENSORRT if unet.plans else TritonBackend.ONNXRUNTIME
    if name not in list(TritonBackend):
        raise UsageError(f"there is no Triton backend {name!r}", hint=f"choose one of {', '.join(TritonBackend)}")
    return TritonBackend(name)


def _list_files(manifest: BundleManifest, part: ComponentName, backend: TritonBackend) -> dict[str, str]:
    """File name in the model's version folder -> file of the bundle."""
    if backend is not TritonBackend.TENSORRT:
        return {file: f"{part}/{file}" for file in _GRAPH_FILES}
    return {PurePosixPath(plan.file).name: plan.file for plan in _select_plans(manifest, part)}


def _select_plans(manifest: BundleManifest, part: ComponentName) -> list[PlanRecord]:
    """The plans of general TensorRT for the bundle's first profile, which is the size that Triton draws."""
    every = manifest.components[part].plans
    plans = [plan for plan in every if plan.flavour == "tensorrt" and plan.profile == 0]
    if not plans:
        holds = "plans of TensorRT-RTX, which Triton cannot load" if every else "no plans"
        raise UsageError(
            f"Triton's TensorRT backend needs plans of general TensorRT, and {part} of this bundle has {holds}",
            hint="export with --backend onnxruntime, or build plans on the GPU machine: "
            + variant_command("--target tensorrt"),
        )
    if len({plan.version for plan in plans}) > 1:
        raise UsageError(
            f"the plans of {part} were built by different TensorRT versions; a Triton server loads one only"
        )
    return plans


def _name_plans(manifest: BundleManifest, part: ComponentName, backend: TritonBackend) -> dict[str, str]:
    """File names by compute capability as Triton writes it; the portable plan under ''."""
    names: dict[str, str] = {}
    for plan in _select_plans(manifest, part) if backend is TritonBackend.TENSORRT else []:
        match = _GENERATION.fullmatch(plan.generation)
        names[f"{match[1]}.{match[2]}" if match else ""] = PurePosixPath(plan.file).name
    return names


def _find_extents(manifest: BundleManifest, backend: TritonBackend) -> Mapping[str, Extent]:
    """What the networks take: a graph all sizes of the bundle, a plan those of the first optimisation profile, with
    which Triton runs it.
    """
    if backend is not TritonBackend.TENSORRT:
        return manifest.extents
    return {**manifest.profile_extents[0], "cfg_batch": manifest.profiles[0].batch.scaled(2)}


def _write_model(target: Path, config: ModelConfig) -> None:
    (target / _VERSION).mkdir(parents=True)
    write_file(target / "config.pbtxt", config.to_text().encode())


def _write_pipeline(folder: Path, settings: dict[str, Any], config: ModelConfig, target: Path) -> None:
    _write_model(target, config)
    version = target / _VERSION
    write_file(version / "pipeline.json", (json.dumps(settings, indent=1) + "\n").encode())
    write_tokenizers(folder, settings, version)
    for source, copy in _PIPELINE_FILES.items():
        _copy_code(source, version / copy)


def _copy_code(name: str, target: Path) -> None:
    write_file(target, files("sdopt.export.triton").joinpath("models", name).read_bytes())


def _list_needs(manifest: BundleManifest, backend: TritonBackend) -> tuple[str, ...]:
    needs = ["numpy and tokenizers in the Python backend's environment"]
    opset = max(record.audit.opset for record in manifest.components.values())
    match backend:
        case TritonBackend.TENSORRT:
            versions = {plan.version for plan in _select_plans(manifest, ComponentName.UNET)}
            needs.append(f"TensorRT {', '.join(sorted(versions))}, of the same version as the plans")
        case TritonBackend.ONNXRUNTIME:
            needs.append(f"the ONNX Runtime backend, with an ONNX Runtime that knows opset {opset}")
        case TritonBackend.PYTHON:
            needs.append(f"onnxruntime in the Python backend's environment, of a version that knows opset {opset}")
    return tuple(needs)
