"""Which plans a bundle needs: one for each component, GPU generation and set of shapes, with its key in the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import SlotsRecord
from sdopt.convert.plan import BuildPlan
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.errors import MissingHardware, RecipeError, UsageError
from sdopt.machine.environment import describe_system, find_version
from sdopt.machine.gpus import find_gpus
from sdopt.machine.machine_record import PlanFlavour
from sdopt.model.component import ComponentName, ComponentSpec
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme
from sdopt.model.shape import CHUNK_TOKENS, Extent, ShapeProfile
from sdopt.model.slots import WORDS_INPUT, WORDS_LIMIT, input_names, slot_shapes
from sdopt.model.target import PORTABLE, Runtime

# A build holds two copies of the weights beside the library and its working memory: `build_peak_bytes` and
# `weights_bytes` of the plans in benchmarks/reports/plans-sd15.json and plans-sdxl.json.
_COPIES, _FIXED_BYTES = 2.1, 400_000_000
# Of quantised weights, beside which the library holds more operations for each byte.
_COPIES_QUANTIZED = 2.4

# The first compute capability with kernels for a scheme; TensorRT-RTX 1.7 refuses to build for an earlier one.
_FIRST_GENERATIONS = {Scheme.FP8: 89, Scheme.INT4_WEIGHTS: 80}
_FIRST_PORTABLE = 80
# What most adapters are trained with: kernels are chosen for it.
_USUAL_RANK = 16
_USUAL_VECTORS = 16

# Counts what the audit looks at: a plan that was audited otherwise is built again, so that its record says as much.
_AUDIT = 2

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input."""
Shapes = tuple[tuple[tuple[str, Bounds], ...], ...]
"""The bounds of every input by name, once for each optimisation profile."""


@dataclass(frozen=True)
class WantedPlan:
    """A plan to be. Profiles share it where they differ in nothing that the component sees."""

    component: ComponentName
    generation: str
    profile: ShapeProfile
    indices: tuple[int, ...]
    key: str
    slots: SlotsRecord | None = None
    """Of the graph with LoRA slots, where the plan is made of that."""


def list_wanted(
    plan: BuildPlan, weights: Mapping[ComponentName, FileRecord], slots: Mapping[ComponentName, SlotsRecord]
) -> list[WantedPlan]:
    """One for each component, generation and set of shapes, the largest component first; and the same with slots."""
    graphs = [(name, each) for name in plan.components for each in dict.fromkeys((None, slots.get(name)))]
    wanted: list[WantedPlan] = []
    for name, slotted in sorted(graphs, key=lambda graph: -weights[graph[0]].size_bytes):
        part = plan.components[name]
        shapes = [
            input_shapes(part.spec, profile, plan.checkpoint.pixels_per_latent, slotted) for profile in plan.profiles
        ]
        for shape in dict.fromkeys(shapes):
            indices = tuple(index for index, other in enumerate(shapes) if other == shape)
            for generation in generations(plan):
                key = digest_of(
                    {"graph": part.architecture, "weights": weights[name].sha256, "shapes": shape,
                     "kind": part.backend.kind, "version": library_version(plan), "generation": generation,
                     "system": describe_system(), "require_fused": requires_fused(plan, name), "audit": _AUDIT}
                    | ({"quantized": dict(part.quantized)} if part.quantized else {})
                )  # fmt: skip
                wanted.append(WantedPlan(name, generation, plan.profiles[indices[0]], indices, key, slotted))
    return wanted


def requires_fused(plan: BuildPlan, component: ComponentName) -> bool:
    """Whether the plan of a component is refused where its attention is not fused: never for the VAE's halves.

    Each has one attention layer and runs once a picture. Its single head of 512 numbers, which SD 1.x, 2.x and XL
    have alike, has no kernel in TensorRT-RTX 1.7: to insist on one would be to insist on no bundle at all.
    """
    vae = component in (ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER)
    return plan.recipe.require_fused and not vae


def generations(plan: BuildPlan) -> tuple[str, ...]:
    """What the plans are for; general TensorRT builds for the GPU that is there, or raises `MissingHardware`."""
    if plan.recipe.target.runtime is Runtime.RTX:
        return plan.recipe.target.generations or (PORTABLE,)
    if plan.recipe.target.runtime is not Runtime.TENSORRT:
        return ()
    gpus = find_gpus()
    if not gpus:
        raise MissingHardware(
            "general TensorRT builds for the GPU of this machine, and there is none",
            hint="build on the GPU machine, or ahead of time with TensorRT-RTX: --target rtx:sm89",
        )
    return (gpus[0].generation,)


def require_builder(plan: BuildPlan) -> None:
    """Raise, before any work, where the library that builds the plans is missing or builds for no such generation.

    `MissingDependency`, `MissingHardware`, or `UsageError` that names what the library can build for.
    """
    require_types(plan)
    from sdopt.backends.tensorrt.loading import buildable_generations, load_library

    kind = _kind(plan)
    library, known = load_library(kind), buildable_generations(kind)
    for generation in generations(plan):
        if kind == "tensorrt-rtx" and generation not in (*known, PORTABLE):
            raise UsageError(
                f"TensorRT-RTX {library.__version__} cannot build for {generation}",
                hint=f"it builds for {', '.join(known)}, and --target rtx makes one plan for Ampere and later",
            )


def require_types(plan: BuildPlan) -> None:
    """Raise where a GPU generation of the plans has no such quantised type, by its name.

    `RecipeError` for a generation that was asked for, `MissingHardware` for that of the GPU in this machine.
    """
    schemes = _wanted_schemes(plan) & _FIRST_GENERATIONS.keys()
    # Without such a type nothing is asked of a GPU, which `tensorrt` would have to find.
    for generation in generations(plan) if schemes else ():
        number = _FIRST_PORTABLE if generation == PORTABLE else int(generation.removeprefix("sm"))
        for scheme, first in _FIRST_GENERATIONS.items():
            if scheme in schemes and number < first:
                kind = scheme.value.partition("-")[0].upper()
                what = "a plan for Ampere and all later" if generation == PORTABLE else generation
                message = f"{what} has no {kind}: {kind} needs sm{first} and later"
                if plan.recipe.target.runtime is Runtime.TENSORRT:
                    raise MissingHardware(message, hint="INT8 runs on every GPU that TensorRT knows: --precision int8")
                raise RecipeError(message, hint=f"--target rtx:sm{first}, or --precision int8, which needs no such GPU")


def _wanted_schemes(plan: BuildPlan) -> set[Scheme]:
    parts = {} if plan.quantization is None else plan.quantization.components
    schemes = {part.scheme for name, part in parts.items() if name in plan.components}
    return schemes | ({Scheme.FP8} if plan.recipe.precision is Precision.FP8 else set())


def _kind(plan: BuildPlan) -> PlanFlavour:
    return "tensorrt-rtx" if plan.recipe.target.runtime is Runtime.RTX else "tensorrt"


def library_version(plan: BuildPlan) -> str:
    """The installed version of the target's library, from its package: nothing is imported."""
    # The library itself does not know of its packages' repairs, as in 10.13.3.9.post1.
    return find_version(_kind(plan)).partition(".post")[0]


def input_shapes(
    spec: ComponentSpec, profile: ShapeProfile, factor: int, slots: SlotsRecord | None = None
) -> Shapes:  # fmt: skip
    """(min, opt, max) of every input, once for each optimisation profile: those of the prompt lengths, with guidance
    and then, where the UNet has them, without.
    """
    chunks = profile.chunk_counts if "prompt_tokens" in spec.named_axes else (1,)
    rows = profile.unet_rows if "cfg_batch" in spec.named_axes else profile.unet_rows[:1]
    ranks = () if slots is None else _slot_bounds(slots)
    return tuple(
        (*_shapes_of(spec, {**_with_chunks(profile, count).axis_extents(factor), "cfg_batch": each}), *ranks)
        for each in rows
        for count in chunks
    )


def profile_tables(manifest: BundleManifest, name: ComponentName) -> tuple[dict[str, Bounds], ...]:
    """The optimisation profiles of a bundle's component as a `PlanJob` has them: none for a graph of fixed shapes."""
    spec = manifest.components[name].spec
    if not spec.named_axes:
        return ()
    return tuple(dict(each) for each in input_shapes(spec, manifest.profile, manifest.require_pixels_per_latent()))


def _slot_bounds(slots: SlotsRecord) -> tuple[tuple[str, Bounds], ...]:
    """Each slot by itself from rank 1, which stands for no adapter: nobody has seen 0 rows computed on a GPU."""
    ranks = (1, min(_USUAL_RANK, slots.rank), slots.rank)
    bounds = []
    for slot in slots.slots:
        least, usual, most = (slot_shapes(slot.shape, rank) for rank in ranks)
        bounds += list(zip(input_names(slot.layer), zip(least, usual, most, strict=True), strict=True))
    if slots.words is not None:
        width = slots.words.width
        bounds.append((WORDS_INPUT, ((1, width), (_USUAL_VECTORS, width), (WORDS_LIMIT, width))))
    return tuple(bounds)


def _with_chunks(profile: ShapeProfile, chunks: int) -> ShapeProfile:
    return dataclasses.replace(profile, tokens=Extent.static(chunks * CHUNK_TOKENS))


def _shapes_of(spec: ComponentSpec, extents: Mapping[str, Extent]) -> tuple[tuple[str, Bounds], ...]:
    def bound(axes: tuple[int | str, ...], side: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else int(getattr(extents[axis], side)) for axis in axes)

    return tuple(
        (tensor.name, (bound(tensor.axes, "min"), bound(tensor.axes, "opt"), bound(tensor.axes, "max")))
        for tensor in spec.inputs
    )


def peak_bytes(weights_bytes: int, *, quantized: bool = False) -> int:
    """Peak memory of building a plan of so many bytes of weights, as they are stored."""
    return int(weights_bytes * (_COPIES_QUANTIZED if quantized else _COPIES)) + _FIXED_BYTES
