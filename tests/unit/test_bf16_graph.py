"""A graph that is typed bf16, as TensorRT takes it: the network, with weights in bf16, that a CPU runtime proves."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

from sdopt.backends.open import open_session
from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.records import ParityRecord
from sdopt.convert import graphs
from sdopt.convert.decide import open_plan
from sdopt.convert.parity import choose_runtime
from sdopt.convert.plan import BuildPlan, ComponentPlan
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.model.recipe import BuildRecipe
from sdopt.model.target import parse_target
from sdopt.trace.compare_outputs import compare_outputs
from sdopt.trace.reference import load_reference, run_reference
from sdopt.trace.seeded_inputs import make_inputs
from sdopt.weights.safetensors_header import read_header
from sdopt.weights.stream import write_weights
from tests.conftest import TINY_SHAPES

# The networks are too small to share out, and tests run beside each other.
torch.set_num_threads(1)

NAMES = (ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER, ComponentName.UNET)


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    return open_plan(BuildRecipe(source=str(TINY_SHAPES), target=parse_target("rtx:sm89"), precision=Precision.BF16))


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, plan: BuildPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a component, named like it, with its graph and weights."""
    name: ComponentName = request.param
    folder = tmp_path_factory.mktemp("built") / name
    folder.mkdir()
    (folder / "model.onnx").write_bytes(graphs._trace(graphs._describe_job(plan, name))[0])
    write_weights(folder / "weights.safetensors", plan.components[name].tensors, DType.BF16, label="")
    return folder


def prove(folder: Path, plan: BuildPlan) -> ParityRecord:
    part: ComponentPlan = plan.components[ComponentName(folder.name)]
    inputs = make_inputs(part.spec, part.config, plan.extents)
    expected = folder / "expected.safetensors"
    run_reference(load_reference(part.spec, part.config, part.tensors), part.spec, inputs, expected)
    files = ComponentFiles(folder, part.spec, part.config, plan.checkpoint.family, plan.extents)
    with open_session(files, choose_runtime(part.graph_dtype)) as session:
        outputs = session.run(inputs)
    for tensor in part.spec.outputs:
        assert outputs[tensor.name].dtype is torch.bfloat16
    return compare_outputs(part.spec, load_file(expected), outputs, runtime="openvino", graph_dtype=part.graph_dtype)


def test_it_is_valid_and_its_floats_are_bf16(built: Path) -> None:
    onnx.checker.check_model(built / "model.onnx", full_check=True)
    graph = onnx.load(built / "model.onnx", load_external_data=False)
    assert graph.opset_import[0].version == 23
    assert {value.dtype for value in load_file(built / "weights.safetensors").values()} == {torch.bfloat16}
    weights = [value for value in graph.graph.initializer if value.external_data]
    assert {value.data_type for value in weights} == {onnx.TensorProto.BFLOAT16}
    # The timestep alone is fp32.
    floats = [value.type.tensor_type.elem_type for value in (*graph.graph.input[:1], *graph.graph.output)]
    assert set(floats) == {onnx.TensorProto.BFLOAT16}


def turn_round(weights: Path) -> None:
    """The other sign for the second convolution of the first block."""
    header = read_header(weights).tensors
    ref = header[next(name for name in header if name.endswith("resnets.0.conv2.weight"))]
    data = bytearray(weights.read_bytes())
    for high in range(ref.offset_bytes + 1, ref.offset_bytes + ref.nbytes, 2):
        data[high] ^= 0x80
    weights.write_bytes(data)


def test_parity_proves_it_and_finds_a_planted_fault(built: Path, plan: BuildPlan) -> None:
    record = prove(built, plan)
    assert record.passed, record
    weights = built / "weights.safetensors"
    sound = weights.read_bytes()
    turn_round(weights)
    record = prove(built, plan)
    weights.write_bytes(sound)
    assert not record.passed, record


def test_a_cpu_runtime_is_chosen_that_reads_the_graph() -> None:
    assert choose_runtime(DType.BF16) == OpenVINOSettings()
    assert choose_runtime(DType.FP16) == OnnxRuntimeSettings(low_memory=True)


def test_tensorrt_parses_it_as_bf16(built: Path) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(built / "model.onnx")), [
        str(parser.get_error(i)) for i in range(parser.num_errors)
    ]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == tensorrt.LayerType.CONVOLUTION]
    assert convolutions
    assert {layer.get_output(0).dtype for layer in convolutions} == {tensorrt.DataType.BF16}
