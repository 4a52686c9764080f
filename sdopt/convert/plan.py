"""Recipe + checkpoint + machine -> what exactly is to be built, with nothing left to decide."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import MappingProxyType

from sdopt.backends.probes import fastest_cpu_settings, probe_backend
from sdopt.checkpoint.checkpoint import Checkpoint
from sdopt.disk.configs import find_config
from sdopt.disk.digest import digest_of
from sdopt.errors import MissingDependency, MissingHardware, RecipeError
from sdopt.model.backend_settings import (
    BackendSettings,
    OnnxRuntimeSettings,
    OpenVINOSettings,
    TensorRTSettings,
    TorchSettings,
    graph_dtype,
    needs_gpu,
)
from sdopt.model.component import (
    ComponentName,
    ComponentSpec,
    Config,
    describe_component,
    native_size_px,
)
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import QuantizationSettings, Scheme, parse_quantization
from sdopt.model.recipe import BuildRecipe, Dialect
from sdopt.model.shape import CHUNK_TOKENS, Extent, ShapeProfile, parse_sizes
from sdopt.model.target import Runtime, Target
from sdopt.weights.safetensors_header import TensorRef
from sdopt.weights.stream import identify_weights, storage_layout

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
class PrecisionChoice:
    """A precision that sdopt found out to be right for one component, and why."""

    precision: Precision
    reason: str


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
    precision_reason: str = ""
    quantized: Mapping[str, Scheme] = field(default_factory=dict)
    """The layers of the staged graph that are quantised; they are found out while the bundle is built."""

    @property
    def graph_dtype(self) -> DType:
        return graph_dtype(self.precision, self.backend)

    @property
    def weights_bytes(self) -> int:
        layout = storage_layout(self.tensors, self.graph_dtype)
        return sum(_nbytes(dtype, shape) for dtype, shape in layout.values())


@dataclass(frozen=True)
class BuildPlan:
    checkpoint: Checkpoint
    recipe: BuildRecipe
    profile: ShapeProfile
    profiles: tuple[ShapeProfile, ...]
    extents: Mapping[str, Extent]
    components: Mapping[ComponentName, ComponentPlan]
    quantization: QuantizationSettings | None = None

    def is_dynamic(self, name: ComponentName) -> bool:
        """Whether a graph has symbolic axes: for several sizes, a range, several prompt lengths, or none or all of the
        rows that guidance adds.
        """
        return _is_dynamic(self.components[name].spec, self.extents)


def resolve_build(
    checkpoint: Checkpoint, recipe: BuildRecipe, chosen: Mapping[ComponentName, PrecisionChoice] = MappingProxyType({})
) -> BuildPlan:
    """Decide sizes, precisions and runtimes; `chosen` overrides the recipe's precision.

    Raises `ShapeError` and `RecipeError` for what cannot be had.
    """
    profiles = _resolve_profiles(recipe, checkpoint)
    for each in profiles:
        each.check_against(checkpoint.multiple_px)
    profile = ShapeProfile.covering(profiles)
    extents = profile.axis_extents(checkpoint.pixels_per_latent)
    names = [name for name in ComponentName if name in checkpoint.components]
    components = {name: _resolve_component(name, checkpoint, recipe, extents, chosen.get(name)) for name in names}
    return BuildPlan(checkpoint, recipe, profile, profiles, extents, components, _read_quantization(recipe))


def _read_quantization(recipe: BuildRecipe) -> QuantizationSettings | None:
    """The quantization file that the recipe names. Raises `RecipeError` for a target that knows no such type."""
    if not recipe.quantization_file:
        return None
    path = find_config("quantization", recipe.quantization_file, "toml")
    try:
        settings = parse_quantization(tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the quantization file {path} cannot be read: {error}") from error
    target, schemes = recipe.target, {part.scheme for part in settings.components.values()}
    if Scheme.FP8 in schemes and not target.runtime.makes_plans:
        raise RecipeError(f"the target {target} has no FP8 arithmetic", hint="FP8 needs --target rtx:sm89 and later")
    if recipe.dialect is Dialect.DECOMPOSED:
        raise RecipeError(f"{recipe.dialect} has no Q/DQ nodes as sdopt writes them", hint="leave `dialect` out")
    return settings


# TensorRT-RTX 1.7 builds no UNet of one row for Turing ("empty runtime-fusion MVMF", seen with that of tiny-shapes):
# drawings without guidance run two rows there, as bundles of before do.
_FAILS_ON_ONE_ROW = frozenset({"sm75"})


def _resolve_profiles(recipe: BuildRecipe, checkpoint: Checkpoint) -> tuple[ShapeProfile, ...]:
    width_px, height_px = native_size_px(checkpoint.unet.config, checkpoint.pixels_per_latent, checkpoint.family)
    sizes = parse_sizes(recipe.size or f"{width_px}x{height_px}", (width_px, height_px))
    tokens = Extent(CHUNK_TOKENS, CHUNK_TOKENS, recipe.tokens)
    unguided = not _FAILS_ON_ONE_ROW & set(recipe.target.generations)
    if not recipe.dynamic:
        batch = Extent.static(recipe.batch)
        return tuple(ShapeProfile(batch, height, width, tokens, unguided=unguided) for width, height in sizes)
    low, high = _DYNAMIC_SIDE_PX

    def span(side_px: Extent) -> Extent:
        return Extent(min(low, side_px.min), side_px.opt, max(high, side_px.max))

    batch = Extent(1, recipe.batch, max(_DYNAMIC_BATCH, recipe.batch))
    return tuple(
        ShapeProfile(batch, span(height), span(width), tokens, unguided=unguided) for width, height in sizes[:1]
    )


def _resolve_component(
    name: ComponentName, checkpoint: Checkpoint, recipe: BuildRecipe, extents: Mapping[str, Extent],
    chosen: PrecisionChoice | None,
) -> ComponentPlan:  # fmt: skip
    source = checkpoint.components[name]
    asked = recipe.precision_of(name) if chosen is None else chosen.precision
    backend = _resolve_backend(recipe.target, asked)
    precision = _precision_of(backend, asked)
    dtype = graph_dtype(precision, backend)
    spec = describe_component(name, source.config, checkpoint.family, dtype)
    architecture = _architecture_key(source.config, spec, extents, source.tensors, dtype, recipe.dialect)
    weights_key = identify_weights(source.tensors, dtype)
    reason = "" if chosen is None else chosen.reason
    return ComponentPlan(spec, source.config, source.tensors, precision, backend, architecture, weights_key, reason)


def _resolve_backend(target: Target, precision: Precision) -> BackendSettings:
    match target.runtime:
        case Runtime.CPU if precision in (Precision.AUTO, Precision.FP32):
            return fastest_cpu_settings(precision)
        # bf16 that was asked for by name is never fp32 in silence: `require_backends` refuses it where it is missing.
        case Runtime.CPU | Runtime.OPENVINO if precision is not Precision.FP16:
            wanted = Precision.BF16 if precision is Precision.BF16 else Precision.FP32
            return OpenVINOSettings(inference_precision=wanted)
        case Runtime.ONNXRUNTIME if precision is not Precision.BF16:
            return OnnxRuntimeSettings()
        case Runtime.CUDA if precision is not Precision.BF16:
            return OnnxRuntimeSettings(device="cuda")
        case Runtime.RTX:
            return TensorRTSettings(kind="tensorrt-rtx")
        case Runtime.TENSORRT:
            return TensorRTSettings(kind="tensorrt")
    known = "fp32 or fp16" if target.runtime in (Runtime.ONNXRUNTIME, Runtime.CUDA) else "fp32 or bf16"
    raise RecipeError(f"the target {target} does not compute in {precision}", hint=f"it takes --precision {known}")


def _precision_of(backend: BackendSettings, asked: Precision) -> Precision:
    match backend:
        case OpenVINOSettings():
            return backend.inference_precision
        case TensorRTSettings():
            return Precision.FP16 if asked is Precision.AUTO else asked
        case OnnxRuntimeSettings(device="cuda"):
            return Precision.FP16 if asked is Precision.AUTO else asked
        case OnnxRuntimeSettings() | TorchSettings():
            return Precision.FP16 if asked is Precision.FP16 else Precision.FP32


def require_backends(plan: BuildPlan) -> None:
    """Raise `EnvironmentMissingError` before the work, where a runtime or the arithmetic that it needs is missing.

    Engines for a GPU are built without one: what that needs is for `build.plans` to say.
    """
    for name, component in plan.components.items():
        if needs_gpu(component.backend):
            continue
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
    dtype: DType, dialect: Dialect,
) -> str:  # fmt: skip
    layout = storage_layout(tensors, dtype)
    return digest_of(
        {
            "format": _GRAPH_FORMAT,
            "config": {key: value for key, value in sorted(config.items()) if key not in _NO_ARCHITECTURE},
            "spec": dataclasses.asdict(spec),
            "extents": {axis: dataclasses.astuple(extents[axis]) for axis in spec.named_axes},
            # Byte offsets are part of the graph, and follow from these.
            "layout": {name: [kind, list(shape)] for name, (kind, shape) in layout.items()},
            "dialect": dialect,
            "dynamic": _is_dynamic(spec, extents),
            "tracers": {name: version(name) for name in _TRACERS},
        }
    )


def _is_dynamic(spec: ComponentSpec, extents: Mapping[str, Extent]) -> bool:
    return any(not extents[axis].is_static for axis in spec.named_axes)


def _nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize_bytes
    for side in shape:
        count *= side
    return count
