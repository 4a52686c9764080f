"""The audit of a plan: what it refuses, by planted faults, and that it finds weights wherever a plan may put them."""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.backends.tensorrt.loading import Kind
from sdopt.backends.tensorrt.plan_audit import NetworkAudit, judge_plan
from sdopt.backends.tensorrt.weight_search import WeightRange, WeightSearch
from sdopt.bundle.records import PlanAudit
from sdopt.errors import AuditError
from sdopt.model.precision import Precision

GOOD = PlanAudit(
    attention_layers=2, attention_native=2, attention_fused=True, compute_layers={"attention fp16": 2},
    other_precision=(), plan_bytes=1100, weights_bytes=1000, zero_share=0.02, weights_zero_share=0.01,
    weights_sampled=10, weights_found=9,
)  # fmt: skip
SOFTMAX = ("node_Softmax_7", "node_Softmax_9")


def judge(*, kind: Kind = "tensorrt-rtx", require_fused: bool = False, native: bool = True, **changes: Any) -> None:
    audit = GOOD.model_copy(update=changes)
    network = NetworkAudit(audit.attention_native, audit.attention_fused, {}, audit.other_precision, SOFTMAX)
    judge_plan(kind, "unet", audit, network, Precision.FP16, require_fused=require_fused, native=native)


def test_a_plan_that_is_what_was_asked_for_passes() -> None:
    judge()
    judge(require_fused=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan_bytes": 800}, "lost weights: it has 800 bytes"),
        ({"zero_share": 0.66}, "66% of its bytes are zero"),
        ({"weights_found": 0}, "of 10 that were looked for in it, 0 are there"),
        ({"other_precision": ("node_conv (fp32)",)}, r"1 layers do not: node_conv \(fp32\)"),
        ({"attention_native": 0}, "written out: node_Softmax_7, node_Softmax_9"),
        ({"require_fused": True, "attention_fused": False, "fused_kernels": 1}, "not fused: 1 of 2 layers have a ded"),
        ({"require_fused": True, "attention_fused": False}, "not fused: not all layers have a dedicated kernel"),
        ({"require_fused": True, "native": False, "attention_native": 1}, "2 attention layers in torch and 1"),
    ],
)
def test_each_fault_is_refused_and_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(AuditError, match=named) as caught:
        judge(**changes)
    assert "unet" in caught.value.message
    assert caught.value.exit_code == 3


def test_what_was_asked_for_is_no_fault() -> None:
    judge(zero_share=0.55, weights_zero_share=0.5)  # a pruned checkpoint
    judge(native=False, attention_native=0, attention_fused=False)  # opset 18 writes attention out
    judge(attention_fused=False, fused_kernels=1)  # only --require-fused insists
    judge(kind="tensorrt", weights_found=0)  # its kernels have layouts of their own
    judge(attention_layers=0, attention_native=0, attention_fused=False, require_fused=True)


_DTYPES = {"fp16": (np.float16, onnx.TensorProto.FLOAT16), "fp32": (np.float32, onnx.TensorProto.FLOAT)}


def make_weights(
    dtype: str, shapes: list[tuple[int, ...]], seed: int
) -> tuple[list[np.ndarray], list[WeightRange], Any]:
    rng = np.random.default_rng(seed)
    kind, code = _DTYPES[dtype]
    arrays = [rng.normal(size=shape).astype(kind) for shape in shapes]
    ranges, offset = [], 0
    for number, array in enumerate(arrays):
        ranges.append(WeightRange(f"w{number}", offset, array.nbytes, code, array.shape))
        offset += array.nbytes
    data = np.frombuffer(b"".join(array.tobytes() for array in arrays), np.uint8)
    return arrays, ranges, data


def cut(blob: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(blob[start : start + size])
        start += size
    return [*pieces, blob[start:]]


LAYOUTS = ["as it is", "axes reversed", "channels last"]
shapes = st.sampled_from([(32, 48), (64, 24), (40, 32, 3, 3), (32, 32, 1, 1)])


@given(
    st.sampled_from(list(_DTYPES)),
    st.lists(st.tuples(shapes, st.sampled_from(LAYOUTS)), min_size=1, max_size=5),
    st.binary(max_size=70),
    st.lists(st.integers(1, 5000), max_size=6),
    st.integers(0, 1000),
    st.booleans(),
)
def test_weights_are_found_in_every_layout_and_across_pieces(
    dtype: str, wanted: list[tuple[tuple[int, ...], str]], head: bytes, sizes: list[int], seed: int,
    everywhere: bool,
) -> None:  # fmt: skip
    arrays, ranges, data = make_weights(dtype, [shape for shape, _ in wanted], seed)
    blob = head if everywhere else head.ljust(len(head) + -len(head) % 8, b"\0")
    for array, (_, layout) in zip(arrays, wanted, strict=True):
        placed = array
        if layout == "axes reversed":
            placed = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        elif layout == "channels last" and array.ndim == 4:
            placed = array.transpose(0, 2, 3, 1)
        blob += np.ascontiguousarray(placed).tobytes()
    search = WeightSearch(ranges, data)
    assert search.sampled
    if everywhere:
        with mmap.mmap(-1, len(blob)) as plan:
            plan.write(blob)
            search.search_everywhere(plan)
    else:
        for piece in cut(blob, sizes):
            search.feed(piece)
    assert search.found == search.sampled


@given(st.integers(0, 1000))
def test_weights_that_are_not_there_are_not_found(seed: int) -> None:
    _, ranges, data = make_weights("fp16", [(64, 64), (32, 48)], seed)
    other = make_weights("fp16", [(64, 64), (32, 48)], seed + 1)[2]
    for blob in (other.tobytes(), bytes(len(other)), (data.view(np.float16) * np.float16(0.5)).tobytes()):
        search = WeightSearch(ranges, data)
        search.feed(blob)
        assert (search.sampled, search.found) == (2, 0)


def test_sixteen_bit_weights_are_found_where_the_plan_has_them_in_fp32() -> None:
    arrays, ranges, data = make_weights("fp16", [(64, 64)], 1)
    widened = arrays[0].astype(np.float32).tobytes()
    for is_widened in (True, False):
        search = WeightSearch([dataclasses.replace(ranges[0], is_widened=is_widened)], data)
        search.feed(widened)
        assert search.found == is_widened


def test_a_weight_without_a_pattern_is_not_looked_for() -> None:
    """Zeros would be found in any plan that lost its weights."""
    data = np.zeros(64 * 64 * 2, np.uint8)
    zeros = WeightRange("w", 0, data.size, onnx.TensorProto.FLOAT16, (64, 64))
    assert WeightSearch([zeros], data).sampled == 0
