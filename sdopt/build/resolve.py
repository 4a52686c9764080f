"""Recipe + checkpoint + machine -> what exactly is to be built, with nothing left to decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sdopt.artifacts.fingerprint import digest_of
from sdopt.artifacts.safetensors_file import TensorRef
from sdopt.backends.open import fastest_cpu_settings, probe_backend
from sdopt.checkpoint.model import Checkpoint
from sdopt.errors import MissingDependency, MissingHardware, RecipeError
from sdopt.export.weights import storage_layout
from sdopt.model.component import ComponentName, ComponentSpec, Config, describe_component, unet_factor, vae_factor
from sdopt.model.family import Family
from sdopt.model.precision import DType, Precision
from sdopt.model.recipe import (
    BackendSettings,
    BuildRecipe,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    Target,
    TorchSettings,
)
from sdopt.model.shape import Extent, ShapeProfile, parse_size

_DYNAMIC_SIDE_PX = (256, 1024)
_DYNAMIC_BATCH = 4
# Configs record where a model was saved and by which version; the network is the same without.
_NO_ARCHITECTURE = (
    "_name_or_path",
    "_diffusers_version",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_class_name",
    "_commit_hash",
)
_TRACERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
# Raise it when a change of sdopt changes the graphs that it makes: no graph of before is used again.
_GRAPH_FORMAT = 1


@dataclass(frozen=True)
class ComponentPlan:
    """One component, decided. `architecture` keys its graph, `weights_key` its weight file."""

    spec: ComponentSpec
    config: Config
    tensors: Mapping[str, TensorRef]
    precision: Precision
    backend: BackendSettings
    architecture: str
    weights_key: str

    @property
    def graph_dtype(self) -> DType:
        return self.precision.graph_dtype

    @property
    def weights_bytes(self) -> int:
        layout = storage_layout(self.tensors, self.graph_dtype)
        return sum(_nbytes(dtype, shape) for dtype, shape in layout.values())


@dataclass(frozen=True)
class BuildPlan:
    checkpoint: Checkpoint
    recipe: BuildRecipe
    profile: ShapeProfile
    extents: Mapping[str, Extent]
    components: Mapping[ComponentName, ComponentPlan]


def resolve_build(checkpoint: Checkpoint, recipe: BuildRecipe) -> BuildPlan:
    """Decide sizes, precisions and runtimes. Raises `ShapeError` and `RecipeError` for what cannot be had."""
    vae = checkpoint.components[ComponentName.VAE_DECODER].config
    unet = checkpoint.components[ComponentName.UNET].config
    profile = _resolve_profile(recipe, unet, vae, checkpoint.family)
    profile.check_against(vae_factor(vae) * unet_factor(unet))
    extents = profile.axis_extents(vae_factor(vae))
    names = [name for name in ComponentName if name in checkpoint.components]
    components = {name: _resolve_component(name, checkpoint, recipe, extents) for name in names}
    return BuildPlan(checkpoint, recipe, profile, extents, components)


def _resolve_profile(recipe: BuildRecipe, unet: Config, vae: Config, family: Family) -> ShapeProfile:
    if recipe.size:
        width_px, height_px = parse_size(recipe.size)
    else:
        side = unet.get("sample_size")
        sides = side if isinstance(side, list | tuple) else (side, side)
        # A UNet's config counts in latent elements; old ones leave it out.
        height_px, width_px = (int(s) * vae_factor(vae) if s else family.native_size_px for s in sides)
    if not recipe.dynamic:
        return ShapeProfile.static(height_px=height_px, width_px=width_px, batch=recipe.batch, tokens=recipe.tokens)
    low, high = _DYNAMIC_SIDE_PX

    def span(side_px: int) -> Extent:
        return Extent(min(low, side_px), side_px, max(high, side_px))

    batch = Extent(1, recipe.batch, max(_DYNAMIC_BATCH, recipe.batch))
    return ShapeProfile(batch, span(height_px), span(width_px), Extent.static(recipe.tokens))


def _resolve_component(
    name: ComponentName, checkpoint: Checkpoint, recipe: BuildRecipe, extents: Mapping[str, Extent]
) -> ComponentPlan:
    source = checkpoint.components[name]
    backend = _resolve_backend(recipe.target, recipe.precision_of(name))
    precision = _precision_of(backend, recipe.precision_of(name))
    spec = describe_component(name, source.config, checkpoint.family, precision.graph_dtype)
    architecture = _architecture_key(source.config, spec, extents, source.tensors, precision, recipe)
    weights_key = digest_of([_tensor_identity(name, ref, precision) for name, ref in sorted(source.tensors.items())])
    return ComponentPlan(spec, source.config, source.tensors, precision, backend, architecture, weights_key)


def _resolve_backend(target: Target, precision: Precision) -> BackendSettings:
    match target:
        case Target.CPU if precision in (Precision.AUTO, Precision.FP32):
            return fastest_cpu_settings(precision)
        # bf16 that was asked for by name is never fp32 in silence: `require_backends` refuses it where it is missing.
        case Target.CPU | Target.OPENVINO if precision is not Precision.FP16:
            wanted = Precision.BF16 if precision is Precision.BF16 else Precision.FP32
            return OpenVINOSettings(inference_precision=wanted)
        case Target.ONNXRUNTIME if precision is not Precision.BF16:
            return OnnxRuntimeSettings()
    known = "fp32 or fp16" if target is Target.ONNXRUNTIME else "fp32 or bf16"
    raise RecipeError(f"the target {target} does not compute in {precision}", hint=f"it takes --precision {known}")


def _precision_of(backend: BackendSettings, asked: Precision) -> Precision:
    match backend:
        case OpenVINOSettings():
            return backend.inference_precision
        case OnnxRuntimeSettings() | TorchSettings():
            return Precision.FP16 if asked is Precision.FP16 else Precision.FP32


def require_backends(plan: BuildPlan) -> None:
    """Raise `EnvironmentMissingError` before the work, where a runtime or the arithmetic that it needs is missing."""
    for name, component in plan.components.items():
        probe = probe_backend(component.backend)
        if not probe.available:
            raise MissingDependency(probe.missing, hint=probe.remedy)
        if component.precision not in probe.precisions:
            raise MissingHardware(
                f"{name} is to compute in {component.precision}, which {probe.backend} cannot on this processor",
                hint=f"it takes --precision {' or '.join(probe.precisions)} here",
            )


def _architecture_key(
    config: Config, spec: ComponentSpec, extents: Mapping[str, Extent], tensors: Mapping[str, TensorRef],
    precision: Precision, recipe: BuildRecipe,
) -> str:  # fmt: skip
    layout = storage_layout(tensors, precision.graph_dtype)
    return digest_of(
        {
            "format": _GRAPH_FORMAT,
            "config": {key: value for key, value in sorted(config.items()) if key not in _NO_ARCHITECTURE},
            "spec": dataclasses.asdict(spec),
            "extents": {name: dataclasses.astuple(extent) for name, extent in extents.items()},
            # Byte offsets are part of the graph, and follow from these.
            "layout": {name: [dtype, list(shape)] for name, (dtype, shape) in layout.items()},
            "dialect": recipe.dialect,
            "dynamic": recipe.dynamic,
            "tracers": {name: version(name) for name in _TRACERS},
        }
    )


def _tensor_identity(name: str, ref: TensorRef, precision: Precision) -> list[Any]:
    """What a weight's bytes depend on, without reading them: the file as the disk knows it, the place, the type."""
    state = ref.file.stat()
    return [
        name, str(ref.file), state.st_size, state.st_mtime_ns, ref.offset_bytes, ref.dtype, list(ref.shape),
        ref.transposed, precision.graph_dtype,
    ]  # fmt: skip


def _nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize_bytes
    for side in shape:
        count *= side
    return count
