"""Graphs as ONNX Runtime's CUDA provider takes them: the same function, by operators that are right and fast there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sdopt.backends.cuda_operators import CudaGraph
from sdopt.backends.onnxruntime import _open
from sdopt.model.component import ComponentName
from tests.unit.test_gpu_runtimes import files_of

GROUPS, CHANNELS = 32, 128


class GroupNorm(OpRun):
    """ONNX Runtime's operator as its documentation defines it."""

    op_domain = "com.microsoft"

    def _run(self, values, scale, bias, activation, channels_last, epsilon, groups):  # type: ignore[no-untyped-def]
        assert channels_last == 1
        assert scale.dtype == bias.dtype == np.float32
        image = torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2)
        normal = torch.nn.functional.group_norm(image, groups, torch.from_numpy(scale), torch.from_numpy(bias), epsilon)
        result = torch.nn.functional.silu(normal) if activation else normal
        return (result.permute(0, 2, 3, 1).numpy().astype(values.dtype),)


IMAGE = (2, CHANNELS, 4, 6)


def save_model(graph: onnx.GraphProto, path: Path) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), str(path))
    return path


def write_graph(
    path: Path, *, readers: str = "silu", shape: tuple[int | str, ...] = IMAGE, groups: int = GROUPS,
    dtype: int = TensorProto.FLOAT16,
) -> Path:  # fmt: skip
    random = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    scale, bias = (random.standard_normal(shape[1]).astype(kind) for _ in range(2))
    inputs = ["x", "scale", "bias"]
    nodes = [helper.make_node("GroupNormalization", inputs, ["normal"], num_groups=groups, epsilon=1e-3)]
    outputs = ["out"]
    if readers == "none":
        nodes.append(helper.make_node("Neg", ["normal"], ["out"]))
    else:
        nodes.append(helper.make_node("Sigmoid", ["normal"], ["gate"]))
        other = "x" if readers == "another product" else "normal"
        nodes.append(helper.make_node("Mul", [other, "gate"], ["product"]))
        last = ["product", "normal"] if readers in ("a third", "another product") else ["product", "product"]
        nodes.append(helper.make_node("Add", last, ["out"]))
    if readers == "an output":
        outputs.append("normal")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, shape) for name in outputs],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(bias, "bias")],
    )  # fmt: skip
    return save_model(graph, path)


@pytest.mark.parametrize("readers", ["silu", "none", "a third", "an output", "another product"])
def test_a_fused_norm_computes_the_same(readers: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", readers=readers)
    rewritten = CudaGraph(path)
    assert rewritten.fuse_group_norms() == 1
    kinds = Counter(node.op_type for node in rewritten.model.graph.node)
    assert ("Sigmoid" in kinds) == (readers not in ("silu", "none"))
    onnx.checker.check_model(rewritten.model)
    x = np.random.default_rng(1).standard_normal((2, CHANNELS, 4, 6)).astype(np.float16)
    for got, right in zip(
        ReferenceEvaluator(rewritten.model, new_ops=[GroupNorm]).run(None, {"x": x}),
        ReferenceEvaluator(str(path)).run(None, {"x": x}), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(got.astype(np.float32), right.astype(np.float32), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((2, 64, 4, 6), 32, TensorProto.FLOAT16), ((2, 128, 24), 32, TensorProto.FLOAT16),
        (IMAGE, 16, TensorProto.FLOAT16), (IMAGE, 32, TensorProto.FLOAT),
    ],
    ids=["few channels", "no image", "other groups", "fp32"],
)  # fmt: skip
def test_what_its_kernel_was_not_run_with_stays(
    shape: tuple[int, ...], groups: int, dtype: int, tmp_path: Path
) -> None:
    graph = CudaGraph(write_graph(tmp_path / "model.onnx", shape=shape, groups=groups, dtype=dtype))
    before = graph.model.SerializeToString()
    assert graph.fuse_group_norms() == 0
    assert graph.model.SerializeToString() == before


@pytest.mark.parametrize(
    ("widths", "kernel"), [((40, 80, 160), "2"), ((64,), None), ((64, 80), "2"), ((512,), None), ((64, 512), None)]
)
def test_flash_attention_is_for_heads_that_it_computes_right(
    widths: tuple[int, ...], kernel: str | None, tmp_path: Path
) -> None:
    inputs = [helper.make_tensor_value_info(f"q{width}", TensorProto.FLOAT16, (1, 2, 8, width)) for width in widths]
    nodes = [helper.make_node("Attention", [f"q{width}"] * 3, [f"y{width}"]) for width in widths]
    outputs = [helper.make_tensor_value_info(f"y{width}", TensorProto.FLOAT16, (1, 2, 8, width)) for width in widths]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 23)]
    )
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert CudaGraph(tmp_path / "model.onnx").provider_options().get("sdpa_kernel") == kernel


def test_heads_of_unknown_width_are_not_left_to_flash_attention(tmp_path: Path) -> None:
    shapeless = helper.make_tensor_value_info("q", TensorProto.FLOAT16, None)
    node = helper.make_node("Attention", ["q", "q", "q"], ["y"], q_num_heads=2, kv_num_heads=2)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    model = helper.make_model(
        helper.make_graph([node], "g", [shapeless], [output]), opset_imports=[helper.make_opsetid("", 23)]
    )
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert CudaGraph(tmp_path / "model.onnx").provider_options()["sdpa_kernel"] == "2"


def test_a_graph_with_open_rows_is_understood(tmp_path: Path) -> None:
    """As every UNet has: only the rows are open, and what counts here is known."""
    graph = CudaGraph(write_graph(tmp_path / "model.onnx", shape=("rows", CHANNELS, 4, 6)))
    assert graph.fuse_group_norms() == 1
    heads = helper.make_tensor_value_info("q", TensorProto.FLOAT16, ("rows", 2, 8, 64))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ("rows", 2, 8, 64))
    node = helper.make_node("Attention", ["q", "q", "q"], ["y"])
    path = save_model(helper.make_graph([node], "g", [heads], [output]), tmp_path / "heads.onnx")
    assert "sdpa_kernel" not in CudaGraph(path).provider_options()


def test_a_graph_given_as_bytes_finds_its_weight_file(pristine_bundle: Path) -> None:
    files = files_of(pristine_bundle, ComponentName.UNET)
    engine = _open(
        files, onnxruntime.SessionOptions(), ["CPUExecutionProvider"], CudaGraph(files.graph).model.SerializeToString()
    )
    assert {each.name for each in engine.get_inputs()} == {each.name for each in files.spec.inputs}
