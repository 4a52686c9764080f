"""bf16 must not round the angle of a time embedding: its sines are computed in fp32 whatever the engine does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sdopt.backends.openvino import OpenVINOBackend
from sdopt.backends.probes import probe_backend
from sdopt.backends.protocol import ComponentFiles
from sdopt.model.backend_settings import OpenVINOSettings
from sdopt.model.component import ComponentName, ComponentSpec, TensorSpec, Tolerance
from sdopt.model.family import Family
from sdopt.model.precision import DType, Precision

HALF = 160
FREQUENCIES = np.exp(-np.log(10000) * np.arange(HALF) / HALF).astype(np.float32)[None]
PROJECTION = np.random.default_rng(0).normal(size=(2 * HALF, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ComponentFiles:
    """A graph as diffusers' time embedding has it: broadcast, angles, sine and cosine, a linear layer."""
    folder = tmp_path_factory.mktemp("unet")
    constants = {
        "frequencies": FREQUENCIES,
        "projection": PROJECTION,
        "two": np.array([2, 1]),
        "axes": np.array([0, 1]),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["timestep", "axes"], ["column"]),
            helper.make_node("Expand", ["column", "two"], ["rows"]),
            helper.make_node("Mul", ["rows", "frequencies"], ["angles"]),
            helper.make_node("Sin", ["angles"], ["sine"]),
            helper.make_node("Cos", ["angles"], ["cosine"]),
            helper.make_node("Concat", ["cosine", "sine"], ["embedding"], axis=1),
            helper.make_node("MatMul", ["embedding", "projection"], ["out_sample"]),
        ],
        "time",
        [helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [2, 64])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), folder / "model.onnx")
    (folder / "weights.safetensors").write_bytes(b"")
    spec = ComponentSpec(
        ComponentName.UNET, (TensorSpec("timestep", DType.FP32, ()),), (TensorSpec("out_sample", DType.FP32, (2, 64)),),
        Tolerance(1e-3, 1e-6),
    )  # fmt: skip
    return ComponentFiles(folder, spec, {}, Family.SD1, {})


@pytest.mark.parametrize("timestep", [1.0, 257.0, 601.0, 946.42, 999.0])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_time_embedding_keeps_every_step_apart(files: ComponentFiles, precision: Precision, timestep: float) -> None:
    backend = OpenVINOBackend(OpenVINOSettings(inference_precision=precision))
    if precision not in probe_backend(OpenVINOSettings()).precisions:
        pytest.skip("this processor has no bf16 arithmetic")
    with backend.open(files) as session:
        output = session.run({"timestep": torch.tensor(timestep)})["out_sample"].numpy()
    angles = np.float64(timestep) * FREQUENCIES.astype(np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ PROJECTION.astype(np.float64)
    error = np.linalg.norm(output - expected) / np.linalg.norm(np.broadcast_to(expected, output.shape))
    # bf16 rounds values to 2^-9; an angle rounded to bf16 is wrong altogether.
    assert error < (1e-4 if precision is Precision.FP32 else 1e-2)
