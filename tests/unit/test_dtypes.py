"""The table of element types against the libraries whose names and numbers it has."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import np_to_triton_dtype

from sdopt.export.triton.config import _to_triton
from sdopt.model.component import TensorSpec
from sdopt.model.precision import DType
from sdopt.weights.dtypes import DTYPES, numpy_dtype
from sdopt.weights.stream import _as_float, _from_float, _is_finite
from sdopt.weights.to_torch import TORCH_DTYPES

FLOATS = [dtype for dtype in DType if dtype.is_float]


@pytest.mark.parametrize("dtype", DType)
def test_numpy_onnx_and_torch_mean_the_same_type(dtype: DType) -> None:
    kind = numpy_dtype(dtype)
    assert onnx.helper.tensor_dtype_to_np_dtype(DTYPES[dtype].onnx) == kind
    assert TORCH_DTYPES[dtype].itemsize == kind.itemsize == dtype.itemsize_bytes
    ones = torch.ones(3, dtype=TORCH_DTYPES[dtype]).view(torch.uint8).numpy().view(kind)
    assert ones.astype(np.float64).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", sorted(set(DType) - {DType.FP8, DType.BF16}))
def test_triton_calls_a_type_as_its_own_client_does(dtype: DType) -> None:
    assert _to_triton(TensorSpec("x", dtype, (1,)), {}).data_type == f"TYPE_{np_to_triton_dtype(numpy_dtype(dtype))}"


def test_tensorrt_has_the_types_that_are_named() -> None:
    kinds: Any = pytest.importorskip("tensorrt_rtx").DataType
    for dtype, names in DTYPES.items():
        if names.tensorrt:
            assert getattr(kinds, names.tensorrt).itemsize == dtype.itemsize_bytes


@given(arrays.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False)))
def test_bf16_is_rounded_to_the_nearest_and_ties_go_to_even(values: np.ndarray) -> None:
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    raw = _from_float(values, DType.BF16)
    np.testing.assert_array_equal(raw.view(np.uint16), nearest)
    widened = _as_float(raw, DType.BF16, "x").astype(np.float32)
    np.testing.assert_array_equal(widened.view(np.uint32), nearest.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_number_is_finite_and_what_lies_beyond_is_not(dtype: DType) -> None:
    kind = numpy_dtype(dtype)
    largest = ml_dtypes.finfo(kind).max
    for values, finite in (([largest, -largest], True), ([1.0, np.inf], False), ([-np.inf], False), ([np.nan], False)):
        assert _is_finite(np.array(values, kind).view(np.uint8), dtype) is finite
    assert _is_finite(np.empty(0, np.uint8), dtype)
