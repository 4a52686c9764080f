"""`config.pbtxt` of the models in a Triton repository, as protobuf text.

Every name that comes from a manifest is checked before it is written: what is quoted in a config cannot end its quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sdopt.errors import ArtifactError, UnsafeInputError
from sdopt.model.component import ComponentSpec, TensorSpec
from sdopt.model.file_names import GRAPH_NAME
from sdopt.model.precision import DType
from sdopt.model.shape import Extent

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


class TritonBackend(StrEnum):
    """Who runs the networks in Triton."""

    TENSORRT = "tensorrt"
    """TensorRT plans, one for each generation of GPUs."""
    ONNXRUNTIME = "onnxruntime"
    """ONNX graphs in Triton's ONNX Runtime backend."""
    PYTHON = "python"
    """ONNX graphs in onnxruntime inside the Python backend, for a Triton without the ONNX Runtime backend."""


@dataclass(frozen=True)
class TritonTensor:
    """One input or output: -1 is an axis of any size. Triton knows no scalars."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A model; batches are explicit in `dims`, for the engines are built for a fixed or bounded one.

    `plans` are file names of TensorRT plans by compute capability, as in `8.9`; `file` is the model for all others.
    """

    name: str
    head: Mapping[str, str]
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    instance_kind: str
    file: str = ""
    plans: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """Protobuf text. Raises `UnsafeInputError` for a name that has other than plain characters."""
        lines = [f"name: {quote(self.name)}", *(f"{key}: {quote(value)}" for key, value in self.head.items())]
        lines.append("max_batch_size: 0")
        if self.file:
            lines.append(f"default_model_filename: {quote(self.file)}")
        lines += _list_tensors("input", self.inputs) + _list_tensors("output", self.outputs)
        lines.append(f"instance_group [ {{ count: 1 kind: {self.instance_kind} }} ]")
        for capability, file in sorted(self.plans.items()):
            lines.append(f"cc_model_filenames {{ key: {quote(capability)} value: {quote(file)} }}")
        return "\n".join(lines) + "\n"


def quote(name: str) -> str:
    """A plain name in quotes. Raises `UnsafeInputError` for one that could mean more than itself."""
    if not _PLAIN.fullmatch(name) or ".." in name:
        raise UnsafeInputError(
            f"{name[:80]!r} cannot be a name in Triton: letters, digits, '_', '.', '+' and '-' can",
            hint="choose another with --name",
        )
    return f'"{name}"'


def configure_network(
    name: str, spec: ComponentSpec, extents: Mapping[str, Extent], backend: TritonBackend, plans: Mapping[str, str]
) -> ModelConfig:
    """The config of one network. `plans` are file names by compute capability, and under `""` the one for all."""
    heads = {
        TritonBackend.TENSORRT: {"platform": "tensorrt_plan", "backend": "tensorrt"},
        TritonBackend.ONNXRUNTIME: {"platform": "onnxruntime_onnx", "backend": "onnxruntime"},
        TritonBackend.PYTHON: {"backend": "python"},
    }
    files = {TritonBackend.ONNXRUNTIME: GRAPH_NAME, TritonBackend.PYTHON: "model.py"}
    return ModelConfig(
        name=name,
        head=heads[backend],
        inputs=tuple(_to_triton(tensor, extents) for tensor in spec.inputs),
        outputs=tuple(_to_triton(tensor, extents) for tensor in spec.outputs),
        instance_kind={TritonBackend.TENSORRT: "KIND_GPU", TritonBackend.ONNXRUNTIME: "KIND_AUTO"}.get(
            backend, "KIND_CPU"
        ),
        file=files.get(backend, plans.get("", "")),
        plans={capability: file for capability, file in plans.items() if capability},
    )


def configure_pipeline(name: str, latents: Sequence[int], height_px: int, width_px: int) -> ModelConfig:
    """The config of the model that draws: prompts (pictures,) -> uint8 pictures (pictures, height, width, 3)."""
    return ModelConfig(
        name=name,
        head={"backend": "python"},
        inputs=(
            TritonTensor("prompt", "TYPE_STRING", (-1,)),
            TritonTensor("negative_prompt", "TYPE_STRING", (-1,), optional=True),
            TritonTensor("seed", "TYPE_INT64", (-1,), optional=True),
            TritonTensor("steps", "TYPE_INT32", (1,), optional=True),
            TritonTensor("guidance_scale", "TYPE_FP32", (1,), optional=True),
            TritonTensor("latents", "TYPE_FP32", (-1, *latents), optional=True),
        ),
        outputs=(TritonTensor("generated_image", "TYPE_UINT8", (-1, height_px, width_px, 3)),),
        instance_kind="KIND_CPU",
        file="model.py",
    )


def _to_triton(tensor: TensorSpec, extents: Mapping[str, Extent]) -> TritonTensor:
    if tensor.dtype is DType.FP8:
        raise ArtifactError(f"Triton has no type for {tensor.name}, which is {tensor.dtype}")
    dims = tuple(axis if isinstance(axis, int) else _to_dim(extents[axis]) for axis in tensor.axes)
    return TritonTensor(tensor.name, f"TYPE_{tensor.dtype.upper()}", dims or (1,))


def _to_dim(extent: Extent) -> int:
    return extent.opt if extent.is_static else -1


def _list_tensors(kind: str, tensors: Sequence[TritonTensor]) -> list[str]:
    return [
        f"{kind} {{ name: {quote(tensor.name)} data_type: {tensor.data_type} "
        f"dims: [ {', '.join(map(str, tensor.dims))} ]{' optional: true' if tensor.optional else ''} }}"
        for tensor in tensors
    ]
