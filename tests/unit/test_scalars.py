"""A graph whose scalar inputs were given an axis computes what it did before."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sdopt.graph.scalars import lift_scalars


@pytest.fixture
def model() -> onnx.ModelProto:
    """y = x * t + t, where t is a scalar that two nodes use and x is none."""
    nodes = [helper.make_node("Mul", ["x", "t"], ["xt"]), helper.make_node("Add", ["xt", "t"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
        helper.make_tensor_value_info("t", TensorProto.FLOAT, []),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model: onnx.ModelProto, timestep: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "t": timestep}
    return np.asarray(session.run(None, feeds)[0])


def test_the_outputs_stay_and_the_scalar_has_an_axis(model: onnx.ModelProto) -> None:
    before = run(model, np.asarray(601.5, np.float32))
    lift_scalars(model)
    assert [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input] == [[2, 3], [1]]
    assert np.array_equal(run(model, np.asarray([601.5], np.float32)), before)
