"""What others call an element type: one table, which loads no library.

What only one side knows stays there: ONNX's and TensorRT's INT4, of which two share a byte of our UINT8; OpenVINO's
hints; and the words in which a TensorRT-RTX plan lists its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdopt.model.precision import DType

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DTypeNames:
    safetensors: str
    """In the header of a file: https://huggingface.co/docs/safetensors."""
    array: str
    """In numpy, with ml_dtypes, and in torch."""
    onnx: int
    """`onnx.TensorProto.DataType`, whose numbers onnx_ir shares."""
    tensorrt: str = ""
    """`tensorrt.DataType`; empty for a type that TensorRT does not have."""


DTYPES: Mapping[DType, DTypeNames] = {
    DType.FP64: DTypeNames("F64", "float64", 11),
    DType.FP32: DTypeNames("F32", "float32", 1, "FLOAT"),
    DType.FP16: DTypeNames("F16", "float16", 10, "HALF"),
    DType.BF16: DTypeNames("BF16", "bfloat16", 16, "BF16"),
    DType.INT64: DTypeNames("I64", "int64", 7, "INT64"),
    DType.INT32: DTypeNames("I32", "int32", 6, "INT32"),
    DType.INT16: DTypeNames("I16", "int16", 5),
    DType.INT8: DTypeNames("I8", "int8", 3, "INT8"),
    DType.UINT8: DTypeNames("U8", "uint8", 2, "UINT8"),
    DType.FP8: DTypeNames("F8_E4M3", "float8_e4m3fn", 17, "FP8"),
    DType.BOOL: DTypeNames("BOOL", "bool", 9, "BOOL"),
}
BY_SAFETENSORS = {names.safetensors: dtype for dtype, names in DTYPES.items()}
BY_ONNX = {names.onnx: dtype for dtype, names in DTYPES.items()}
BY_TENSORRT = {names.tensorrt: dtype for dtype, names in DTYPES.items() if names.tensorrt}


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """numpy's type, which is one of ml_dtypes for bf16 and FP8."""
    import ml_dtypes
    import numpy as np

    name = DTYPES[dtype].array
    return np.dtype(getattr(ml_dtypes, name, name))
