"""The kernels that a plan of TensorRT-RTX lists in its own text: read where it is as expected, and else not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.backends.tensorrt.plan_text import count_attention, count_kernels, find_widened, read_kernels
from sdopt.model.quantization import Scheme

# Lines of a plan of TensorRT-RTX 1.7, shortened.
TEXT = """header {
  version = 5
  inputs={ "sample.1" }
}
descriptors {
  tensor={ alignment=128 dims={ 2 4 } name="x8" offset=0 rank0=0 region=devmem strides={ 4 1 } type=int8 }
  tensor={ alignment=128 const_payload_size=16 dims={ 4 4 } name="w8" offset=7 stride_order={ 1 0 } type=int8 }
  sub_tensor={ dims={ 2 4 } name="x16" parent="y" type=half }
  tensor={ alignment=128 dims={ 4 4 } name="w16^deref" strides={ 4 1 } type=half }
  tensor={ alignment=128 dims={ 4 4 } name="w4" strides={ 4 1 } type=int4 }
  tensor={ alignment=128 dims={ 4 4 } name="f8" strides={ 4 1 } type=fp8_e4m3 }
  tensor={ alignment=128 dims={ 1 } name="alpha" strides={ 1 } type=float }
}
main {
 label bb1:
  function={ name=__myl_MulRounCast fqn=__myl_0x1 args={ "x16" "x8" } input_args={ "x16" } output_args={ "x8" } }
  corrltn={ name="conv" output={"x16" } input={"x8" "w8" "alpha" } layers="[ONNX Layer: node_conv]" }
  fully_connected={ name="q+k" input={"x8" "w8" } layers="[ONNX Layer: node_q]\x1e[ONNX Layer: node_k]" }
  fully_connected={ name="half" output={"x16" } input={"x16" "w16^deref" "alpha" } layers="[ONNX Layer: node_half]" }
  corrltn={ name="wide" output={"x16" } input={"x16" "w16^deref" } layers="[ONNX Layer: node_wide]" }
  fully_connected={ name="fp8" output={"x16" } input={"f8" "f8" } layers="[ONNX Layer: node_fp8]" }
  runtime_fusion={ name=__myl_Fc input_args={ "x16" "x16" "w4" } binary=1 layers="[ONNX Layer: node_4]" backbone=gemm }
  runtime_fusion={ name=__myl_Norm input_args={ "x16" "w8" } binary=1 layers="[ONNX Layer: node_norm]" backbone=none }
  function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x1 args={ "x16" } input_args={ "x16" "x16" } output_args={ "x16" } }
  corrltn={ name="unknown" output={"x16" } input={"nowhere" "w8" } layers="[ONNX Layer: node_unknown]" }
}
shape_main {
 label bb2:
}
"""
FUSED = """header {
  version = 4
}
main {
  fully_connected={ name="again" output={"x16" } input={"x16" "x16" } layers="[ONNX Layer: node_4]" }
}
"""


def write_plan(path: Path, *texts: str, head: bytes = b"vtrt", tail: bytes = b"weights") -> Path:
    parts = [b"NLYM" + bytes(4) + len(text).to_bytes(8, "little") + text.encode("latin-1") for text in texts]
    path.write_bytes(head + b"\1kernels\0".join(parts) + tail)
    return path


def test_kernels_are_counted_by_kind_and_operands(tmp_path: Path) -> None:
    kernels = read_kernels(write_plan(tmp_path / "plan", TEXT, FUSED, head=b"NLYM" + bytes(3000)))
    assert count_kernels(kernels) == {
        "attention fp16": 1, "convolution fp16": 1, "convolution int8": 1, "convolution unknown x int8": 1,
        "matmul fp16": 1, "matmul fp16 x int4": 1, "matmul fp8": 1, "matmul int8": 1,
    }  # fmt: skip


def test_attention_is_counted_where_there_are_kernels_to_count(tmp_path: Path) -> None:
    assert count_attention(read_kernels(write_plan(tmp_path / "plan", TEXT))) == 1
    written_out = TEXT.replace("mha", "Softmax").replace("attention", "Softmax").replace("flash", "Softmax")
    assert count_attention(read_kernels(write_plan(tmp_path / "plan", written_out))) == 0
    assert count_attention(read_kernels(write_plan(tmp_path / "plan"))) is None


def test_layers_that_the_plan_widens_are_named(tmp_path: Path) -> None:
    kernels = read_kernels(write_plan(tmp_path / "plan", TEXT))
    nodes = {
        "conv": ("node_conv", Scheme.INT8), "q": ("node_q", Scheme.INT8), "k": ("node_k", Scheme.INT8),
        "fp8": ("node_fp8", Scheme.FP8), "wide": ("node_wide", Scheme.INT8_WEIGHTS),
        "four": ("node_4", Scheme.INT4_WEIGHTS), "half": ("node_half", Scheme.INT8), "gone": ("node_gone", Scheme.INT8),
        "mixed": ("node_4", Scheme.INT8),
    }  # fmt: skip
    # One operand is not enough where both were to be quantised; of a layer that no kernel names nothing is said.
    assert find_widened(kernels, nodes) == ("wide", "half", "mixed")


@pytest.mark.parametrize(
    "texts", [(), (FUSED,), (TEXT.replace("header {", "headline {"),), (TEXT.replace("shape_main", "main2"),)]
)
def test_a_plan_without_such_a_text_has_no_kernels(texts: tuple[str, ...], tmp_path: Path) -> None:
    assert read_kernels(write_plan(tmp_path / "plan", *texts)) == ()


def test_a_text_is_found_across_the_pieces_that_are_read(tmp_path: Path) -> None:
    for place in range((1 << 20) - 5, (1 << 20) + 2):
        assert read_kernels(write_plan(tmp_path / "plan", TEXT, head=bytes(place)))


@given(st.binary(max_size=200), st.binary(max_size=60), st.integers(0, len(TEXT)))
def test_no_bytes_break_it(tmp_path_factory: pytest.TempPathFactory, head: bytes, tail: bytes, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.plan"
    path.write_bytes(head + b"NLYM" + tail + TEXT[cut:].encode("latin-1"))
    assert isinstance(read_kernels(path), tuple)
