"""`sdopt export comfyui`: a UNet as ComfyUI's TensorRT loader takes it.

The loader (comfyanonymous/ComfyUI_TensorRT) feeds tensors of other names than a bundle's engines have, and has general
TensorRT only: its engine is built from a copy of the graph, on the machine with the GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from sdopt.backends.probes import probe_backend
from sdopt.backends.tensorrt.builder import Bounds, BuildOptions, build_plan
from sdopt.backends.tensorrt.loading import Kind, load_library
from sdopt.backends.tensorrt.parsed_network import parse_graph
from sdopt.backends.tensorrt.plan_audit import allow_decomposed_attention
from sdopt.bundle.manifest import BundleManifest
from sdopt.disk.files import disk_errors, fsync_folder, write_file
from sdopt.errors import MissingDependency, UsageError
from sdopt.export.comfyui.flat_graph import adapt_unet
from sdopt.export.published_folder import copy_file, open_bundle, staged, sum_bytes
from sdopt.export.triton.config import quote
from sdopt.graph.external_data import check_graph_file
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.model.file_names import GRAPH_NAME, WEIGHTS_NAME
from sdopt.model.shape import Extent
from sdopt.model.task import Task

_UNET = ComponentName.UNET
_FILES = (f"{_UNET}/model.onnx", f"{_UNET}/weights.safetensors")


@dataclass(frozen=True)
class ComfyExport:
    """`path` is the engine, or the folder of the graph. `model_type` is what to choose in the loader's node."""

    path: Path
    engine: str
    model_type: str


def export_graph(folder: Path, output: Path, *, name: str | None = None) -> ComfyExport:
    """Write the UNet's graph with ComfyUI's tensor names, and its weights, to `output`; whole or not at all.

    Raises `UsageError` for a model that the loader has no type for.
    """
    manifest = open_bundle(folder)
    found = _describe(folder, manifest, name, output)
    with staged(output, "comfyui", manifest, sum_bytes(manifest, _FILES)) as growing:
        write_file(growing / GRAPH_NAME, adapt_graph(folder).SerializeToString())
        copy_file(folder, _FILES[1], growing / WEIGHTS_NAME)
    return found


def export_engine(folder: Path, comfyui: Path, *, name: str | None = None) -> ComfyExport:
    """Build the engine for this machine's GPU into `models/tensorrt` of ComfyUI's folder.

    Raises `UsageError` where that is not a folder of ComfyUI, holds such an engine, or for a model that the loader has
    no type for, and `MissingDependency` where general TensorRT or a GPU is missing.
    """
    manifest = open_bundle(folder)
    if not (comfyui / "models").is_dir():
        raise UsageError(
            f"{comfyui} is not a folder of ComfyUI: it has no models folder", hint="give ComfyUI's own folder with -o"
        )
    engine = _describe(folder, manifest, name, comfyui).engine
    target = comfyui / "models" / "tensorrt" / engine
    if target.exists():
        raise UsageError(f"{target} is already there", hint="remove it, or choose another name with --name")
    probe = probe_backend(TensorRTSettings(kind="tensorrt"))
    if not probe.available:
        raise MissingDependency(
            f"ComfyUI's engine is built with general TensorRT on the GPU that it will run on: {probe.missing}",
            hint=f"{probe.remedy or 'run this on the GPU machine'}; or export with --graph, and build it there",
        )
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".sdopt-export.") as work:
            built = Path(work) / engine
            build_engine(adapt_graph(folder), folder / _FILES[1], _find_extents(manifest), built)
            built.rename(target)
        fsync_folder(target.parent)
    return ComfyExport(target, engine, find_model_type(manifest))


def build_engine(
    model: onnx.ModelProto,
    weights: Path,
    extents: Mapping[str, Extent],
    output: Path,
    *,
    kind: Kind = "tensorrt",
    generation: str = "",
) -> None:
    """Build the engine of an adapted graph. `generation` is of TensorRT-RTX only, which ComfyUI's loader does not have.

    Raises what `sdopt.backends.tensorrt.builder.build_plan` raises.
    """
    bounds = _bound_inputs(model, extents)
    library = load_library(kind)
    with parse_graph(library, model, weights, component=_UNET) as network:
        # An engine for a tool that has no other: one without a fused kernel is better than none.
        allow_decomposed_attention(network.network, library)
        options = BuildOptions(generation, (bounds,) if bounds else ())
        build_plan(network, options, output, label="building ComfyUI's engine")


def adapt_graph(folder: Path) -> onnx.ModelProto:
    """The UNet's graph of a bundle with ComfyUI's tensor names; its weights are the bundle's, byte for byte."""
    model = check_graph_file(folder / _FILES[0])
    adapt_unet(model)
    return model


def find_model_type(manifest: BundleManifest) -> str:
    """What to choose in the loader's node. Raises `UsageError` where it has nothing for this model."""
    velocity = manifest.prediction is Prediction.V_PREDICTION
    inpainting = manifest.own_task is Task.INPAINT
    if not inpainting:
        match manifest.family, velocity:
            case Family.SDXL, False:
                return "sdxl_base"
            case Family.SDXL_REFINER, False:
                return "sdxl_refiner"
            case Family.SD1 | Family.SD2, True:
                return "sd2.x-768v"
            case Family.SD1 | Family.SD2, False:
                return "sd1.x"
            case _:
                pass
    kind = f"{manifest.family}{' inpainting' if inpainting else ''}, {manifest.prediction}"
    raise UsageError(f"ComfyUI's TensorRT loader has no model type for {manifest.name} ({kind})")


def name_engine(name: str, rows: Extent, height_px: Extent, width_px: Extent) -> str:
    """The file name as ComfyUI's own converter writes it: the sizes are part of it."""
    quote(name)
    sides = {"b": rows, "h": height_px, "w": width_px}
    if all(side.is_static for side in sides.values()):
        shape = "-".join(["stat", *(f"{letter}-{side.opt}" for letter, side in sides.items())])
    else:
        shape = "-".join(["dyn", *(f"{letter}-{s.min}-{s.max}-{s.opt}" for letter, s in sides.items())])
    return f"{name}_${shape}_00001_.engine"


def _find_extents(manifest: BundleManifest) -> Mapping[str, Extent]:
    """Two rows a picture, as ComfyUI runs a guided drawing: an engine for a range of rows would be slower."""
    return {**manifest.extents, "cfg_batch": manifest.profile.batch.scaled(2)}


def _describe(folder: Path, manifest: BundleManifest, name: str | None, path: Path) -> ComfyExport:
    profile, rows = manifest.profile, _find_extents(manifest)["cfg_batch"]
    engine = name_engine(name or manifest.name, rows, profile.height_px, profile.width_px)
    return ComfyExport(path, engine, find_model_type(manifest))


def _bound_inputs(model: onnx.ModelProto, extents: Mapping[str, Extent]) -> dict[str, Bounds]:
    """Smallest, usual and largest shape of each input with a named axis."""
    bounds: dict[str, Bounds] = {}
    for value in model.graph.input:
        axes = value.type.tensor_type.shape.dim
        if any(axis.dim_param for axis in axes):
            sides = [extents[axis.dim_param] if axis.dim_param else Extent.static(axis.dim_value) for axis in axes]
            bounds[value.name] = (
                tuple(side.min for side in sides), tuple(side.opt for side in sides), tuple(side.max for side in sides),
            )  # fmt: skip
    return bounds
