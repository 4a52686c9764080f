"""Quantised graphs compute, in every runtime, what fake quantisation computes in torch."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdopt.backends.open import open_session
from sdopt.backends.protocol import Session, ShowsKernels
from sdopt.convert.blocks.write import Stock, StockJob, find_layers, publish_choice, stock_in_child, write_trial
from sdopt.errors import ExportError
from sdopt.graph.external_data import check_graph_file
from sdopt.graph.qdq import LayerChoice, insert_qdq, takes
from sdopt.graph.sites import WeightedLayer, list_layers
from sdopt.graph.slots import add_slots
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.quantization import Scheme
from sdopt.model.slots import SlotSet
from sdopt.trace.bind import bind_weights, rebind_weights
from sdopt.trace.reference import load_reference
from sdopt.trace.seeded_inputs import make_inputs
from sdopt.weights.safetensors_header import read_header
from sdopt.weights.stream import storage_layout, write_weights
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.conftest import TINY_SHAPES
from tests.unit.test_slots import lay_out, seeded_pair
from tests.unit.test_trace import Built, build

torch.set_num_threads(1)

INT8, FP8, W8, W4 = Scheme.INT8, Scheme.FP8, Scheme.INT8_WEIGHTS, Scheme.INT4_WEIGHTS
FLOATS = {DType.FP32: (TensorProto.FLOAT, torch.float32), DType.FP16: (TensorProto.FLOAT16, torch.float16)}
_FLAGS = set(re.findall(r"\b\w*(?:vnni|amx_int8)\b", Path("/proc/cpuinfo").read_text("ascii")))
# On x86 without VNNI two products of 8 bits are summed in 16 bits: both runtimes saturate there, and nothing equals
# torch. `convert` finds that by the error that it measures.
needs_exact_int8 = pytest.mark.skipif(
    not _FLAGS, reason="this processor has no VNNI: its INT8 products saturate in 16 bits"
)
# What is far above the rounding of the arithmetic, and far below what quantisation does in these tests.
CLOSE = {DType.FP32: 2e-4, DType.FP16: 5e-3}
LINEAR = ("first", "second", "gemm")


def make_weights() -> dict[str, Tensor]:
    """fp16 weights as a checkpoint has them; channels differ in size, so that one scale for all would be coarse."""
    generator = torch.Generator().manual_seed(0)

    def channels(*shape: int) -> Tensor:
        size = torch.logspace(-2, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return (torch.randn(shape, generator=generator) * size * 0.1).half()

    return {
        "conv.weight": channels(8, 4, 3, 3), "conv.bias": channels(8), "first.weight": channels(16, 256),
        "first.bias": channels(16), "second.weight": channels(24, 256), "gemm.weight": channels(16, 256),
        "gemm.bias": channels(16), "table.weight": channels(10, 6), "tied.weight": channels(256, 256),
        "norm.weight": channels(256),
    }  # fmt: skip


def make_proto(weights: Mapping[str, Tensor], dtype: DType) -> onnx.ModelProto:
    """Every kind of layer once: a convolution, two linear ones of one input, a Gemm, a table, and what is none."""
    kind, torch_dtype = FLOATS[dtype]
    nodes = [
        helper.make_node("Conv", ["picture", "conv.weight", "conv.bias"], ["conv_out"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["first.weight"], ["first_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["states", "first_t"], ["first_product"]),
        helper.make_node("Add", ["first_product", "first.bias"], ["first_out"]),
        helper.make_node("Transpose", ["second.weight"], ["second_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["states", "second_t"], ["second_out"]),
        helper.make_node("Gemm", ["rows", "gemm.weight", "gemm.bias"], ["gemm_out"], transB=1),
        helper.make_node("Gather", ["table.weight", "ids"], ["looked_up"]),
        helper.make_node("Neg", ["looked_up"], ["table_out"]),
        helper.make_node("MatMul", ["rows", "tied.weight"], ["tied_once"]),
        helper.make_node("MatMul", ["tied_once", "tied.weight"], ["tied_twice"]),
        helper.make_node("Mul", ["tied_twice", "norm.weight"], ["tied_out"]),
    ]
    inputs = {"picture": [2, 4, 8, 8], "states": [2, 5, 256], "rows": [3, 256]}
    outputs = {"conv_out": [2, 8, 8, 8], "first_out": [2, 5, 16], "second_out": [2, 5, 24], "gemm_out": [3, 16],
               "table_out": [2, 5, 6], "tied_out": [3, 256]}  # fmt: skip
    graph = helper.make_graph(
        nodes, "layers",
        [*(helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()),
         helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 5])],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value.to(torch_dtype).numpy(), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def make_inputs_of_layers(dtype: DType) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"picture": (2, 4, 8, 8), "states": (2, 5, 256), "rows": (3, 256)}
    inputs = {name: torch.randn(shape, generator=generator).to(FLOATS[dtype][1]) for name, shape in shapes.items()}
    return {**inputs, "ids": torch.randint(0, 10, (2, 5), generator=generator)}


@dataclass
class Layers:
    """The graph of `make_proto`, bound to a weight file in `folder`, and all that quantising it takes."""

    folder: Path
    dtype: DType
    weights: Mapping[str, Tensor]

    def quantize(self, choices: Mapping[str, LayerChoice], *, amax: float = 2.0) -> Path:
        """A trial's graph. The range of inputs is narrower than they are: what is beyond it is clipped."""
        write_trial(self.stock(choices, amax=amax), choices, "trial.onnx")
        return self.folder / "trial.onnx"

    def stock(self, choices: Mapping[str, LayerChoice], *, amax: float = 2.0) -> Stock:
        scales = {f"{name}.input_amax": torch.tensor(amax) for name in choices}
        scales |= {f"{name}.smooth": smooth_of(name) for name, choice in choices.items() if choice.smooth}
        save_file(scales, self.folder / "scales.safetensors")
        tensors = read_header(self.folder / "checkpoint.safetensors").tensors
        stock_in_child(StockJob(self.folder, self.dtype, dict(choices), tensors, self.folder / "scales.safetensors"))
        return Stock(self.folder, self.dtype, choices)


def smooth_of(layer: str) -> Tensor:
    return torch.logspace(-1, 1, 256).roll(len(layer))


@pytest.fixture(params=[DType.FP32, DType.FP16])
def layers(request: pytest.FixtureRequest, tmp_path: Path) -> Layers:
    weights, dtype = make_weights(), request.param
    save_file(weights, tmp_path / "checkpoint.safetensors")
    tensors = read_header(tmp_path / "checkpoint.safetensors").tensors
    model = ir.from_proto(make_proto(weights, dtype))
    for value in model.graph.initializers.values():
        value.const_value = None
    bind_weights(model, storage_layout(tensors, dtype), dtype)
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    write_weights(tmp_path / "weights.safetensors", tensors, dtype, label="")
    return Layers(tmp_path, dtype, weights)


def choose(scheme: Scheme, *names: str, smooth: bool = False) -> dict[str, LayerChoice]:
    return {name: LayerChoice(scheme, smooth) for name in names}


def run_onnxruntime(path: Path, inputs: Mapping[str, Tensor], **entries: str) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    # Where weights alone are quantised, it rounds the inputs to INT8 as well by default.
    for key, value in {"qdq_matmulnbits_accuracy_level": "1", **entries}.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value).float() for name, value in zip(names, results, strict=True)}


def run_openvino(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    core = openvino.Core()
    # Without the second, it does as ONNX Runtime does.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    network = core.compile_model(core.read_model(path), "CPU", hints)
    results = network({name: value.numpy() for name, value in inputs.items()})
    # A port may have the names of several values that became one.
    return {
        name: torch.from_numpy(value.copy()).float() for port, value in results.items() for name in port.get_names()
    }


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def unpack(stored: Tensor) -> Tensor:
    """ONNX's INT4, written here apart from the package's code: low half first, two's complement."""
    halves = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).to(torch.int32)
    return torch.where(halves > 7, halves - 16, halves).float()


def read_quantized(folder: Path, scheme: Scheme, layer: str) -> Tensor:
    """A layer's weight as the file of quantised ones means it."""
    file = load_file(folder / "quantized.safetensors")
    stored, scale = file[f"{layer}.weight"], file[f"{layer}.weight_scale"].float()
    if scheme is W4:
        levels = unpack(stored)
        return levels * scale.repeat_interleave(levels.shape[1] // scale.shape[1], dim=1)
    return stored.float() * scale.reshape(-1, *[1] * (stored.ndim - 1))


def fake_quantize(values: Tensor, scheme: Scheme, scale: float) -> Tensor:
    if scheme is FP8:
        return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return (values / scale).round().clamp(-128, 127) * scale


def compute(layers: Layers, choices: Mapping[str, LayerChoice], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the graph should give: in torch, in fp32, with the weights and scales that are in the files."""
    file = load_file(layers.folder / "quantized.safetensors") if choices else {}

    def prepare(layer: str, values: Tensor) -> tuple[Tensor, Tensor]:
        choice = choices.get(layer)
        if choice is None:
            return values.float(), layers.weights[f"{layer}.weight"].float()
        values = values.float()
        if choice.smooth:
            values = values * file[f"{layer}.smooth"].float()
        if choice.scheme.quantizes_activations:
            values = fake_quantize(values, choice.scheme, file[f"{layer}.input_scale"].item())
        return values, read_quantized(layers.folder, choice.scheme, layer)

    values, weight = prepare("conv", inputs["picture"])
    outputs = {"conv_out": nn.functional.conv2d(values, weight, layers.weights["conv.bias"].float(), padding=1)}
    for layer, name in (("first", "states"), ("second", "states"), ("gemm", "rows")):
        values, weight = prepare(layer, inputs[name])
        outputs[f"{layer}_out"] = values @ weight.T
    for layer in ("first", "gemm"):
        outputs[f"{layer}_out"] = outputs[f"{layer}_out"] + layers.weights[f"{layer}.bias"].float()
    _, table = prepare("table", torch.zeros(1))
    outputs["table_out"] = -table[inputs["ids"]]
    tied = layers.weights["tied.weight"].float()
    outputs["tied_out"] = inputs["rows"].float() @ tied @ tied * layers.weights["norm.weight"].float()
    return outputs


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def nodes_of(path: Path, op: str) -> list[onnx.NodeProto]:
    return [node for node in check_graph_file(path).graph.node if node.op_type == op]


CHOICES = {
    "int8": choose(INT8, "conv", *LINEAR),
    "int8 smooth": {**choose(INT8, *LINEAR, smooth=True), **choose(INT8, "conv")},
    "int8 weights": choose(W8, "conv", *LINEAR, "table"),
    "int4 weights": choose(W4, *LINEAR),
    "mixed": {**choose(INT8, "conv", "second"), **choose(W8, "first", "table"), **choose(W4, "gemm")},
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", CHOICES)
def test_a_quantised_graph_computes_what_fake_quantisation_computes(kind: str, runtime: str, layers: Layers) -> None:
    choices = CHOICES[kind]
    if not _FLAGS and any(choice.scheme is INT8 for choice in choices.values()):
        pytest.skip(needs_exact_int8.kwargs["reason"])
    inputs = make_inputs_of_layers(layers.dtype)
    outputs = RUNTIMES[runtime](layers.quantize(choices), inputs)
    expected, exact = compute(layers, choices, inputs), compute(layers, {}, inputs)
    assert outputs.keys() >= expected.keys()
    for name, value in expected.items():
        assert distance(outputs[name], value) < CLOSE[layers.dtype], name
        if (choice := choices.get(name.removesuffix("_out"))) is None:
            assert torch.equal(value, exact[name])
        else:  # or this test could not tell a quantised layer from one that is not
            least = 0.02 if choice.scheme is not W8 else 1e-3
            assert distance(value, exact[name]) > least, name


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", CHOICES)
def test_a_slot_beside_a_quantised_layer_takes_what_was_not_rounded(kind: str, runtime: str, layers: Layers) -> None:
    """Its change is B (A x) of the layer's own input: before the smoothing, and before the clipping at the range."""
    proto = onnx.load(layers.quantize(CHOICES[kind]), load_external_data=False)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    slots = {slot.layer: slot for slot in add_slots(model, SlotSet.ALL)}
    assert slots.keys() == {"conv", *LINEAR}
    (layers.folder / "slots.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    inputs = make_inputs_of_layers(layers.dtype)
    pairs = {layer: seeded_pair(slot, 3, seed) for seed, (layer, slot) in enumerate(slots.items())}

    def run(strength: float) -> dict[str, Tensor]:
        tensors = {
            name: value.to(FLOATS[layers.dtype][1])
            for layer, (down, up) in pairs.items()
            for name, value in lay_out(slots[layer], down, up * strength).items()
        }
        return RUNTIMES[runtime](layers.folder / "slots.onnx", {**inputs, **tensors})

    without, strong = run(0.0), run(1.0)
    for layer, source in (("conv", "picture"), ("first", "states"), ("second", "states"), ("gemm", "rows")):
        down, up = pairs[layer]
        values = inputs[source].float()
        if layer == "conv":
            change = (up @ down.flatten(1)).reshape(slots[layer].shape)
            expected = nn.functional.conv2d(values, change, padding=1)
        else:
            expected = values @ down.T @ up.T
        found = strong[f"{layer}_out"] - without[f"{layer}_out"]
        assert distance(found, expected) < CLOSE[layers.dtype], layer


def test_onnx_own_reference_reads_int4_and_fp8_as_torch_does(layers: Layers) -> None:
    if layers.dtype is DType.FP16:
        pytest.skip("the reference computes FP8 in fp32 alone")
    inputs = make_inputs_of_layers(layers.dtype)
    for choices in (choose(W4, *LINEAR), choose(FP8, "conv", *LINEAR)):
        model = onnx.load(layers.quantize(choices))
        results = ReferenceEvaluator(model).run(None, {name: value.numpy() for name, value in inputs.items()})
        outputs = dict(zip((output.name for output in model.graph.output), results, strict=True))
        for name, value in compute(layers, choices, inputs).items():
            assert distance(torch.from_numpy(np.asarray(outputs[name])), value) < CLOSE[layers.dtype], name


def test_fp8_in_onnxruntime(layers: Layers) -> None:
    choices, inputs = choose(FP8, "conv", *LINEAR), make_inputs_of_layers(layers.dtype)
    outputs = run_onnxruntime(layers.quantize(choices, amax=6.0), inputs, disable_quant_qdq="1")
    expected, exact = compute(layers, choices, inputs), compute(layers, {}, inputs)
    for layer in choices:
        name = f"{layer}_out"
        assert distance(outputs[name], expected[name]) < CLOSE[layers.dtype], name
        assert distance(expected[name], exact[name]) > 0.01, name


def test_what_is_published_is_the_trial_with_one_weight_file(layers: Layers, tmp_path: Path) -> None:
    choices = CHOICES["mixed"]
    stock = layers.stock({**choices, **choose(W8, "first")})
    inputs = make_inputs_of_layers(layers.dtype)
    write_trial(stock, choices, "trial.onnx")
    target = tmp_path / "published"
    record = publish_choice(stock, target, choices, "")
    assert sorted(path.name for path in target.iterdir()) == ["model.onnx", "weights.safetensors"]
    assert record.size_bytes == (target / "weights.safetensors").stat().st_size
    onnx.checker.check_model(target / "model.onnx")
    trial, published = (run_onnxruntime(path, inputs) for path in (layers.folder / "trial.onnx", target / "model.onnx"))
    for name, value in trial.items():
        assert torch.equal(value, published[name]), name
    held = set(load_file(target / "weights.safetensors"))
    named = {entry.name for entry in check_graph_file(target / "model.onnx").graph.initializer if entry.external_data}
    assert held == named, "the file has what no runtime reads"
    assert "second.weight_scale" in held
    assert "table.smooth" not in held


def test_a_choice_of_nothing_is_the_graph_as_it_was(layers: Layers, tmp_path: Path) -> None:
    stock = layers.stock(CHOICES["mixed"])
    publish_choice(stock, tmp_path / "published", {}, "")
    before, after = (
        check_graph_file(folder / "model.onnx").graph for folder in (layers.folder, tmp_path / "published")
    )
    assert Counter(node.op_type for node in after.node) == Counter(node.op_type for node in before.node)
    held = load_file(tmp_path / "published" / "weights.safetensors")
    assert held.keys() == layers.weights.keys()
    assert all(torch.equal(held[name], layers.weights[name].to(held[name].dtype)) for name in held)


@pytest.mark.parametrize(("scheme", "zero"), [(INT8, TensorProto.INT8), (FP8, TensorProto.FLOAT8E4M3FN)])
def test_weights_have_a_dequantize_and_inputs_a_pair(scheme: Scheme, zero: int, layers: Layers) -> None:
    path = layers.quantize(choose(scheme, "conv", *LINEAR))
    graph = check_graph_file(path).graph
    onnx.checker.check_model(path)
    stored = {entry.name: entry for entry in graph.initializer}
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Clip"] == 0
    assert counts["QuantizeLinear"] == 3, "picture, states and rows"
    assert counts["DequantizeLinear"] == 3 + 4
    assert "second.input_scale" not in stored, "first and second share an input"
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert node.input[0] in ("picture", "states", "rows"), "weights are quantised beforehand"
            assert stored[node.input[2]].data_type == zero
            assert not np.any(numpy_helper.to_array(stored[node.input[2]]).astype(np.float32))
    by_output = {node.output[0]: node for node in graph.node}
    for layer in ("conv", *LINEAR):
        users = [node for node in graph.node if f"{layer}.weight" in node.input]
        assert [node.op_type for node in users] == ["DequantizeLinear"]
        assert list(stored[f"{layer}.weight"].dims) == list(layers.weights[f"{layer}.weight"].shape)
        assert stored[f"{layer}.weight"].data_type == zero
    for kind in ("Conv", "MatMul", "Gemm"):
        for node in graph.node:
            if node.op_type == kind and not node.output[0].startswith("tied"):
                assert by_output[node.input[0]].op_type == "DequantizeLinear"
    # No Cast is left behind for a weight that needs none; those of the others stay.
    casts = [node.input[0] for node in graph.node if node.op_type == "Cast"]
    wide = ["conv.bias", "first.bias", "gemm.bias", "norm.weight", "table.weight", "tied.weight"]
    assert sorted(casts) == (wide if layers.dtype is DType.FP32 else [])


def test_smoothed_inputs_are_no_pair_of_two_layers(layers: Layers) -> None:
    path = layers.quantize({**choose(INT8, *LINEAR, smooth=True), **choose(INT8, "conv")})
    assert len(nodes_of(path, "QuantizeLinear")) == 4
    smoothed = [node for node in nodes_of(path, "Mul") if node.input[1].endswith(".smooth")]
    assert sorted(node.input[0] for node in smoothed) == ["rows", "states", "states"]
    assert len({node.input[1] for node in smoothed}) == 3


def test_a_table_is_widened_before_it_is_looked_up(layers: Layers) -> None:
    """TensorRT-RTX takes no other form, and gathers from the INT8 table."""
    path = layers.quantize(choose(W8, "table"))
    (user,) = [node for node in check_graph_file(path).graph.node if "table.weight" in node.input]
    assert user.op_type == "DequantizeLinear"
    (gather,) = nodes_of(path, "Gather")
    assert gather.input[0] == user.output[0]
    assert not nodes_of(path, "QuantizeLinear")


def test_weights_of_two_layers_and_of_no_matrix_are_no_layers(layers: Layers) -> None:
    found = find_layers(layers.folder)
    assert sorted(found) == ["conv", "first", "gemm", "second", "table"]
    assert found["second"] == WeightedLayer("second", "MatMul", (24, 256))
    assert {name: layer.op for name, layer in found.items() if layer.op != "MatMul"} == {
        "conv": "Conv", "gemm": "Gemm", "table": "Gather",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["third", "tied", "norm", "conv.weight"])
def test_an_unknown_layer_is_named(name: str, layers: Layers) -> None:
    model = ir.load(layers.folder / "model.onnx")
    with pytest.raises(ExportError, match=f"no layer '{name}' to quantise"):
        insert_qdq(model, {**choose(INT8, "conv"), **choose(INT8, name)})


@pytest.mark.parametrize(("name", "scheme"), [("table", INT8), ("table", FP8), ("table", W4), ("conv", W4)])
def test_a_scheme_that_a_layer_does_not_take_is_refused(name: str, scheme: Scheme, layers: Layers) -> None:
    model = ir.load(layers.folder / "model.onnx")
    assert not takes(list_layers(model)[name], scheme)
    with pytest.raises(ExportError, match=f"'{name}'.*cannot be quantised to {scheme}"):
        insert_qdq(model, choose(scheme, name))


def test_int4_takes_whole_blocks_alone() -> None:
    assert takes(WeightedLayer("a", "MatMul", (5, 256)), W4)
    assert not takes(WeightedLayer("a", "MatMul", (256, 96)), W4)
    assert not takes(WeightedLayer("a", "Conv", (8, 128, 1, 1)), W4)
    assert takes(WeightedLayer("a", "Conv", (8, 128, 1, 1)), W8)


def test_a_weight_without_a_place_or_of_another_size_is_named(layers: Layers) -> None:
    choices = choose(INT8, "conv")
    stock = layers.stock(choices)
    model = ir.load(layers.folder / "model.onnx")
    insert_qdq(model, choices)
    places = {
        **read_header(layers.folder / "weights.safetensors").tensors,
        **read_header(stock.folder / "quantized.safetensors").tensors,
    }
    rebind_weights(model, places)
    for missing in ("conv.weight_scale", "norm.weight"):
        with pytest.raises(ExportError, match=missing):
            rebind_weights(model, {name: ref for name, ref in places.items() if name != missing})
    with pytest.raises(ExportError, match=r"'conv\.weight' of 288 bytes"):
        rebind_weights(model, {**places, "conv.weight": places["first.weight"]})
    # The 16-bit weight of that name is twice as large: it is not taken for the quantised one.
    with pytest.raises(ExportError, match=r"'conv\.weight'"):
        rebind_weights(model, {**places, **read_header(layers.folder / "weights.safetensors").tensors})


# Real networks


class FakeQuantized:
    """torch's own network in fp32, whose layers compute as they are quantised in `folder`."""

    def __init__(self, built: Built, choices: Mapping[str, LayerChoice]) -> None:
        self.network = load_reference(built.files.spec, built.files.config, built.tensors)
        self.spec = built.files.spec
        file = load_file(built.files.folder / "quantized.safetensors") if choices else {}
        modules = {name.removeprefix("network."): module for name, module in self.network.named_modules()}
        for name, choice in choices.items():
            with torch.no_grad():
                modules[name].weight.copy_(read_quantized(built.files.folder, choice.scheme, name))
            if choice.scheme.quantizes_activations:
                scale, factor = file[f"{name}.input_scale"].item(), file.get(f"{name}.smooth", torch.ones(()))
                modules[name].register_forward_pre_hook(
                    lambda _, given, scheme=choice.scheme, scale=scale, factor=factor: (
                        fake_quantize(given[0] * factor.float(), scheme, scale),
                    )
                )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            outputs = self.network(*(inputs[tensor.name] for tensor in self.spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: value for tensor, value in zip(self.spec.outputs, outputs, strict=True)}


def stock_calibrated(built: Built, choices: Mapping[str, LayerChoice]) -> Stock:
    """Scales by the largest inputs, and for layers that are smoothed a factor that their weights have to undo."""
    network, inputs = FakeQuantized(built, {}).network, inputs_of(built)
    modules = {name.removeprefix("network."): module for name, module in network.named_modules()}
    scales: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            values = given[0]
            if choices[name].smooth:
                scales[f"{name}.smooth"] = 1 / values.flatten(0, -2).abs().amax(dim=0).clamp(min=1e-3).sqrt()
                values = values * scales[f"{name}.smooth"]
            scales[f"{name}.input_amax"] = values.abs().max()

        return note

    for name in choices:
        modules[name].register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        network(*inputs.values())
    save_file(scales, built.files.folder / "scales.safetensors")
    folder = built.files.folder
    stock_in_child(StockJob(folder, built.dtype, dict(choices), dict(built.tensors), folder / "scales.safetensors"))
    return Stock(folder, built.dtype, choices)


def inputs_of(built: Built) -> dict[str, Tensor]:
    inputs = make_inputs(built.files.spec, built.files.config, built.files.extents)
    return {tensor.name: inputs[tensor.name] for tensor in built.files.spec.inputs}


def outputs_of(built: Built, choices: Mapping[str, LayerChoice]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """torch's outputs with the chosen layers quantised, and without."""
    inputs = inputs_of(built)
    return FakeQuantized(built, choices)(inputs), FakeQuantized(built, {})(inputs)


def open_trial(built: Built, settings: Any) -> Session:
    return open_session(dataclasses.replace(built.files, graph_name="trial.onnx"), settings)


CPU_RUNTIMES = (OnnxRuntimeSettings(), OpenVINOSettings())


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("unet")
    source = write_folder(folder / "model", make_model(small_recipe(Family.SD1)))
    return build(folder / "unet", source, ComponentName.UNET)


@pytest.fixture(scope="module", params=[DType.FP32, DType.FP16])
def text_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("text") / "text", TINY_SHAPES, ComponentName.TEXT_ENCODER, request.param)


def is_smoothed(name: str) -> bool:
    return name.endswith((".ff.net.2", ".attn2.to_k", ".attn2.to_v"))


@needs_exact_int8
def test_a_unet_whole_in_int8_is_as_far_from_torch_as_fake_quantisation(unet: Built) -> None:
    """Roundings of a later layer fall otherwise for the least difference before it: figures agree, and no pixels."""
    names = [name for name in find_layers(unet.files.folder) if name not in ("conv_in", "conv_out")]
    choices = {name: LayerChoice(INT8, is_smoothed(name)) for name in names}
    assert len(names) > 70
    stock = stock_calibrated(unet, choices)
    write_trial(stock, choices, "trial.onnx")
    path = unet.files.folder / "trial.onnx"
    onnx.checker.check_model(path)
    before, after = (Counter(node.op_type for node in check_graph_file(file).graph.node)
                     for file in (unet.files.graph, path))  # fmt: skip
    assert after["Attention"] == before["Attention"] > 0
    assert after["Clip"] == after["Softmax"] == 0
    assert after["DequantizeLinear"] == len(names) + after["QuantizeLinear"]
    expected, exact = outputs_of(unet, choices)
    error = distance(expected["out_sample"], exact["out_sample"])
    for settings in CPU_RUNTIMES:
        with open_trial(unet, settings) as session:
            off = distance(session.run(inputs_of(unet))["out_sample"], exact["out_sample"])
            assert 0.8 * error < off < 1.25 * error, settings.kind
            if isinstance(session, ShowsKernels):
                assert session.integer_layers() == len(names), "a quantised layer computes in floats"


# A few layers, of which none or one sees what another has rounded.
FEW = {
    "time embedding": [".time_emb_proj"],
    "linear": [".0.transformer_blocks.0.attn2.to_q", ".0.transformer_blocks.0.attn2.to_k"],
    "convolution": ["up_blocks.1.resnets.1.conv2", "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2"],
}


@needs_exact_int8
@pytest.mark.parametrize("few", FEW)
def test_layers_of_a_unet_in_int8_are_torchs_with_fake_quantisation(few: str, unet: Built) -> None:
    names = [name for name in find_layers(unet.files.folder) if name.endswith(tuple(FEW[few]))]
    assert names
    choices = {name: LayerChoice(INT8, is_smoothed(name)) for name in names}
    write_trial(stock_calibrated(unet, choices), choices, "trial.onnx")
    expected, exact = outputs_of(unet, choices)
    for settings in CPU_RUNTIMES:
        with open_trial(unet, settings) as session:
            off = distance(session.run(inputs_of(unet))["out_sample"], expected["out_sample"])
        assert off < distance(expected["out_sample"], exact["out_sample"]) / 10, settings.kind


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_text_encoder_with_int8_weights_is_torchs_with_them(runtime: str, text_encoder: Built) -> None:
    layers = find_layers(text_encoder.files.folder)
    assert layers["embeddings.token_embedding"].op == "Gather"
    choices = choose(W8, *layers)
    write_trial(stock_calibrated(text_encoder, choices), choices, "trial.onnx")
    path = text_encoder.files.folder / "trial.onnx"
    onnx.checker.check_model(path)
    expected, exact = outputs_of(text_encoder, choices)
    outputs = RUNTIMES[runtime](path, inputs_of(text_encoder))
    for name, value in expected.items():
        assert distance(outputs[name], value) < distance(value, exact[name]) / 2
        assert distance(outputs[name], value) < CLOSE[text_encoder.dtype]


def test_a_graph_in_fp8_runs_where_its_gpu_is_not(text_encoder: Built) -> None:
    """Where no GPU runs the plans, the pictures are judged on the graphs: fp16 ones in ONNX Runtime, as it is."""
    names = [name for name, layer in find_layers(text_encoder.files.folder).items() if layer.op == "MatMul"]
    choices = choose(FP8, *names)
    write_trial(stock_calibrated(text_encoder, choices), choices, "trial.onnx")
    expected, exact = outputs_of(text_encoder, choices)
    if text_encoder.dtype is DType.FP32:  # it takes the pair into a kernel of its own, which knows no FP8
        outputs = run_onnxruntime(
            text_encoder.files.folder / "trial.onnx", inputs_of(text_encoder), disable_quant_qdq="1"
        )
    else:
        with open_trial(text_encoder, OnnxRuntimeSettings()) as session:
            outputs = session.run(inputs_of(text_encoder))
    errors = {name: distance(value, exact[name]) for name, value in expected.items()}
    assert max(errors.values()) > 0.005
    for name, error in errors.items():  # the states before the first layer are as they were
        assert 0.8 * error - 1e-3 < distance(outputs[name].float(), exact[name]) < 1.25 * error + 1e-3
