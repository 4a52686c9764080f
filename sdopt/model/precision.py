"""Number formats: what a tensor is stored in (`DType`) and what an engine computes in (`Precision`)."""

from __future__ import annotations

from enum import StrEnum


class DType(StrEnum):
    """Element type of a tensor. The value is the name in manifests and reports; `fp8` is E4M3 without infinity."""

    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    FP8 = "fp8"
    BOOL = "bool"

    @property
    def itemsize_bytes(self) -> int:
        return _ITEMSIZE_BYTES[self]

    @property
    def is_float(self) -> bool:
        return self in (DType.FP64, DType.FP32, DType.FP16, DType.BF16)


_ITEMSIZE_BYTES = {
    DType.FP64: 8, DType.INT64: 8, DType.FP32: 4, DType.INT32: 4, DType.FP16: 2, DType.BF16: 2, DType.INT16: 2,
    DType.INT8: 1, DType.UINT8: 1, DType.FP8: 1, DType.BOOL: 1,
}  # fmt: skip


class Precision(StrEnum):
    """What an engine computes in. `AUTO` is resolved by the planner from the target and the machine.

    `INT8` and `FP8` ask for quantised blocks wherever they pay; what stays is resolved as by `AUTO`.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def is_quantized(self) -> bool:
        return self in (Precision.INT8, Precision.FP8)
