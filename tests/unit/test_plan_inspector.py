"""Counting fused attention in what TensorRT's inspector says, and the answer of a machine that cannot load a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdopt.backends.tensorrt.inspector import count_attention_kernels, inspect_attention
from sdopt.backends.tensorrt.loading import load_library
from sdopt.machine.gpus import find_gpus


def layer(name: str, tactic: str = "") -> dict[str, Any]:
    return {"Name": name, "LayerType": "kgen", "Inputs": [], "Outputs": [], "TacticName": tactic}


def test_fused_kernels_are_counted_once_each() -> None:
    layers = [
        layer("_gemm_mha_v2_myl0_12", "_gemm_mha_v2_0x7f"),
        layer("__myl_Fc_myl0_3", "fmha_v2_flash_attention_fp16_S_40_sm89"),
        layer("__myl_Softmax_myl0_4", "__myl_Softmax"),
        layer("conv_in", "sm80_xmma_fprop_implicit_gemm_f16f16"),
    ]
    assert count_attention_kernels(json.dumps({"Layers": layers, "Bindings": []})) == 2


def test_names_alone_say_nothing() -> None:
    assert count_attention_kernels(json.dumps({"Layers": ["conv_in", "mha"]})) is None


@pytest.mark.skipif(bool(find_gpus()), reason="there is a GPU")
def test_without_a_gpu_there_is_no_answer(tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)
    assert library is load_library("tensorrt-rtx")
    path = tmp_path / "plan"
    path.write_bytes(bytes(4096))
    assert inspect_attention(library, path) is None
