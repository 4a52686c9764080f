"""Which runtime computes a component, and how: the settings of each backend."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdopt.model.precision import DType, Precision


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OpenVINOSettings(Frozen):
    kind: Literal["openvino"] = "openvino"
    inference_precision: Literal[Precision.FP32, Precision.BF16] = Precision.FP32


class OnnxRuntimeSettings(Frozen):
    kind: Literal["onnxruntime"] = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"
    low_memory: bool = False
    """Load with a third less memory and without the optimiser: for parity, where a graph runs once."""


class TensorRTSettings(Frozen):
    """Plans of TensorRT-RTX or of general TensorRT: one Python API, one code path."""

    kind: Literal["tensorrt-rtx", "tensorrt"]
    cuda_graphs: bool = True
    """Capture each engine's run once and replay it; for engines of one static shape."""


class TorchSettings(Frozen):
    """The baseline: torch eager, or compiled, on the bundle's own weights."""

    kind: Literal["torch"] = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal[Precision.FP32, Precision.BF16, Precision.FP16] = Precision.FP32
    compile: bool = False
    compile_mode: Literal["default", "max-autotune"] | None = None
    """How thoroughly inductor searches; None takes max-autotune on a GPU, and the default on a CPU."""
    channels_last: bool | None = None
    """Whether convolutions take channels-last tensors; None does so on a GPU."""
    attention: Literal["sdpa", "math", "flash", "efficient", "cudnn", "flash-attn", "sage", "xformers"] = "sdpa"
    """`sdpa` leaves the choice to torch; the next four are torch's own kernels, the last three are packages."""


BackendSettings = Annotated[
    OpenVINOSettings | OnnxRuntimeSettings | TensorRTSettings | TorchSettings, Field(discriminator="kind")
]


def needs_gpu(backend: BackendSettings) -> bool:
    match backend:
        case TensorRTSettings() | OnnxRuntimeSettings(device="cuda") | TorchSettings(device="cuda"):
            return True
    return False


def graph_dtype(precision: Precision, backend: BackendSettings) -> DType:
    """Float type of a graph's activations.

    TensorRT takes its precision from the graph. CPU runtimes compute in bf16 on an fp32 graph, by a hint: none of them
    takes a graph that is typed bf16.
    """
    match precision, backend:
        case Precision.FP16, _:
            return DType.FP16
        case Precision.BF16, TensorRTSettings():
            return DType.BF16
    return DType.FP32
