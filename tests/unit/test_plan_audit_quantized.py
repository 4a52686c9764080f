"""The audit of quantised plans: layers counted by where their inputs come from, and weights of a byte or less found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.backends.tensorrt.plan_audit import NetworkAudit, audit_network, judge_plan
from sdopt.backends.tensorrt.weight_search import WeightRange, WeightSearch
from sdopt.bundle.records import PlanAudit
from sdopt.convert.plans.build import JOB, PlanJob, Rung
from sdopt.errors import AuditError
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme


@dataclass
class Layer:
    """A layer of a network as TensorRT's Python API shows it; its one output has its name."""

    kind: str
    name: str
    inputs: list[tuple[str, str]] = field(default_factory=list)
    output: str = "HALF"

    @property
    def type(self) -> Any:
        return SimpleNamespace(name=self.kind)

    @property
    def metadata(self) -> str:
        return f"[ONNX Layer: node_{self.name}]"

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    num_outputs = 1

    def get_input(self, index: int) -> Any:
        name, kind = self.inputs[index]
        return SimpleNamespace(name=name, dtype=SimpleNamespace(name=kind))

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name=self.name, dtype=SimpleNamespace(name=self.output))


class Network:
    def __init__(self) -> None:
        self.layers: list[Layer] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def add(self, kind: str, name: str, *inputs: tuple[str, str], output: str = "HALF") -> tuple[str, str]:
        self.layers.append(Layer(kind, name, list(inputs), output))
        return name, output

    def add_layer(
        self, name: str, weight: str = "INT8", given: str = "INT8", *, kind: str = "MATRIX_MULTIPLY",
        stored: str = "CONSTANT",
    ) -> None:  # fmt: skip
        """A layer whose weight and input go through Q/DQ of these types; an empty one goes as it is."""
        x: tuple[str, str] = ("x", "HALF")
        if given:
            quantized = self.add("QUANTIZE", f"{name}.q", x, ("scale", "HALF"), output=given)
            x = self.add("DEQUANTIZE", f"{name}.dq", quantized, ("scale", "HALF"))
        w = self.add(stored, f"{name}.weight", output=weight or "HALF")
        if weight:
            w = self.add("DEQUANTIZE", f"{name}.dequantized", w, ("scale", "HALF"))
        moved = self.add("SHUFFLE", f"{name}.moved", self.add("SHUFFLE", f"{name}.transposed", w))
        self.add(kind, name, x, moved)


def audit(network: Network, **wanted: Scheme) -> NetworkAudit:
    return audit_network(network, None, Precision.FP16, {name.replace("_", "."): s for name, s in wanted.items()})


@pytest.mark.parametrize(
    ("weight", "given", "scheme"),
    [
        ("INT8", "INT8", Scheme.INT8), ("FP8", "FP8", Scheme.FP8), ("INT8", "", Scheme.INT8_WEIGHTS),
        ("INT4", "", Scheme.INT4_WEIGHTS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["MATRIX_MULTIPLY", "CONVOLUTION"])
def test_a_layer_is_counted_by_its_scheme(kind: str, weight: str, given: str, scheme: Scheme) -> None:
    network = Network()
    network.add_layer("a.proj", weight, given, kind=kind)
    network.add_layer("a.other", "", "", kind=kind)
    found = audit(network, a_proj=scheme)
    name = "convolution" if kind == "CONVOLUTION" else "matmul"
    assert found.compute_layers == {f"{name} fp16": 1, f"{name} {scheme}": 1}
    assert found.quantized == {"a.proj": ("node_a.proj", scheme)}
    assert found.other_precision == found.unquantized == ()


def test_a_layer_that_nobody_asked_to_quantise_is_named() -> None:
    network = Network()
    network.add_layer("a.proj")
    assert audit(network).other_precision == ("node_a.proj (int8)",)
    network.add_layer("b.proj", "INT8", "INT8", stored="ELEMENTWISE")
    found = audit(network, a_proj=Scheme.INT8)
    assert found.other_precision == ("node_b.proj (int8 weights, int8 inputs over float weights)",)


@pytest.mark.parametrize(
    ("weight", "given", "asked", "instead"),
    [
        ("", "", Scheme.INT8, "not quantised"),
        ("INT8", "", Scheme.INT8, "int8-weights"),
        ("INT8", "INT8", Scheme.INT8_WEIGHTS, "int8"),
        ("INT8", "INT8", Scheme.FP8, "int8"),
        ("FP8", "", Scheme.FP8, "fp8 weights"),
        ("INT4", "INT8", Scheme.INT4_WEIGHTS, "int4 weights, int8 inputs"),
    ],
)
def test_a_layer_that_is_not_as_asked_is_named_with_what_it_is(
    weight: str, given: str, asked: Scheme, instead: str
) -> None:
    network = Network()
    network.add_layer("a.proj", weight, given)
    network.add_layer("b.proj")
    found = audit(network, a_proj=asked, b_proj=Scheme.INT8)
    assert found.unquantized == (f"a.proj ({instead}, not {asked})",)
    assert list(found.quantized) == ["b.proj"]


def test_quantised_weights_that_another_operation_makes_are_not_as_asked() -> None:
    """`QuantizeLinear` and `Clip` over float weights, with which TensorRT-RTX loses them."""
    network = Network()
    network.add_layer("a.proj", stored="ELEMENTWISE")
    assert audit(network, a_proj=Scheme.INT8).unquantized == ("a.proj (not quantised, not int8)",)


def test_a_table_of_embeddings_is_a_layer() -> None:
    network = Network()
    table = network.add("CONSTANT", "tokens.weight", output="INT8")
    network.add("GATHER", "lookup", network.add("DEQUANTIZE", "wide", table, ("scale", "HALF")), ("ids", "INT32"))
    network.add("GATHER", "other", ("x", "HALF"), ("ids", "INT32"))
    found = audit(network, tokens=Scheme.INT8_WEIGHTS)
    assert found.quantized == {"tokens": ("node_lookup", Scheme.INT8_WEIGHTS)}
    assert audit(network).other_precision == ("node_lookup (int8-weights)",)


def test_dequantising_to_another_type_than_the_engine_computes_in_is_named() -> None:
    network = Network()
    network.add_layer("a.proj")
    network.layers[-1].inputs[0] = ("a.proj.dq", "FLOAT")
    assert audit(network, a_proj=Scheme.INT8).other_precision == ("node_a.proj (fp32)",)


RECORD = PlanAudit(
    attention_layers=0, attention_native=0, attention_fused=False, compute_layers={}, other_precision=(),
    plan_bytes=1100, weights_bytes=1000, zero_share=0.0, weights_zero_share=0.0, weights_sampled=2, weights_found=2,
)  # fmt: skip


def test_a_plan_with_a_layer_that_is_not_quantised_is_refused() -> None:
    network = Network()
    network.add_layer("a.proj")
    network.add_layer("b.proj", "", "")
    found = audit(network, a_proj=Scheme.INT8, b_proj=Scheme.INT8)
    with pytest.raises(AuditError) as caught:
        judge_plan("tensorrt-rtx", "unet", RECORD, found, Precision.FP16, require_fused=False, native=True)
    assert "unet was to have 2 quantised layers, and 1 of them are otherwise" in caught.value.message
    assert "b.proj (not quantised, not int8)" in caught.value.message


def test_a_plan_that_lost_quantised_weights_alone_is_refused() -> None:
    network = Network()
    network.add_layer("a.proj")
    found = audit(network, a_proj=Scheme.INT8)
    record = RECORD.model_copy(
        update={"weights_sampled": 20, "weights_found": 16, "quantized_sampled": 4, "quantized_found": 2}
    )
    with pytest.raises(AuditError, match="of 4 quantised ones that were looked for in it, 2 are there"):
        judge_plan("tensorrt-rtx", "unet", record, found, Precision.FP16, require_fused=False, native=True)
    # General TensorRT's kernels have layouts of their own.
    judge_plan("tensorrt", "unet", record, found, Precision.FP16, require_fused=False, native=True)
    record = record.model_copy(update={"quantized_found": 3})
    judge_plan("tensorrt-rtx", "unet", record, found, Precision.FP16, require_fused=False, native=True)


def test_quantised_weights_are_looked_for_beside_the_others() -> None:
    """However few there are."""
    rng = np.random.default_rng(0)
    big, small = rng.normal(size=(400, 400)).astype(np.float16), make_weight("int8", (32, 32), 1)
    data = np.frombuffer(big.tobytes() + small.tobytes(), np.uint8)
    ranges = [
        WeightRange("big", 0, big.nbytes, onnx.TensorProto.FLOAT16, big.shape),
        WeightRange("small", big.nbytes, small.nbytes, onnx.TensorProto.INT8, small.shape),
    ]
    search = WeightSearch(ranges, data)
    assert (search.sampled, search.quantized_sampled) == (2, 1)
    search.feed(big.tobytes())
    assert (search.found, search.quantized_found) == (1, 0)
    search.feed(small.tobytes())
    assert (search.found, search.quantized_found) == (2, 1)


def test_the_schemes_reach_the_child_process(tmp_path: Any) -> None:
    job = PlanJob(
        kind="tensorrt-rtx", component=ComponentName.UNET, precision=Precision.FP16, graph=tmp_path, weights=tmp_path,
        output=tmp_path, generation="sm89", profiles=(), attention_layers=1, native=True, require_fused=False,
        rung=Rung("alone"), memory_limit_bytes=None, timing_cache=None, quantized={"a.proj": Scheme.INT8},
    )  # fmt: skip
    dumped = JOB.dump_python(job, mode="json")
    assert dumped["quantized"] == {"a.proj": "int8"}
    assert JOB.validate_python(dumped) == job
    del dumped["quantized"]
    assert JOB.validate_python(dumped) == dataclasses.replace(job, quantized={})


_CODES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN, "int4": onnx.TensorProto.INT4}


def make_weight(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of a normal weight, the largest of each row at the end of the scale; INT4 in a byte each."""
    values = np.random.default_rng(seed).normal(size=shape)
    flat = values.reshape(len(values), -1)
    largest = {"int8": 127, "fp8": 127, "int4": 7}[kind]
    scaled = np.round(flat / np.abs(flat).max(1, keepdims=True) * largest).astype(np.int8).reshape(shape)
    return scaled.view(np.uint8) & (15 if kind == "int4" else 255)


def place(kind: str, values: np.ndarray) -> bytes:
    """As it lies in a file: two INT4 numbers share a byte, the first in its low half."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return (flat[::2] | flat[1::2] << 4 if kind == "int4" else flat).tobytes()


def search_for(kind: str, arrays: list[np.ndarray]) -> WeightSearch:
    ranges, data = [], b""
    for number, array in enumerate(arrays):
        raw = place(kind, array)
        ranges.append(WeightRange(f"w{number}", len(data), len(raw), _CODES[kind], array.shape))
        data += raw
    return WeightSearch(ranges, np.frombuffer(data, np.uint8))


SHAPES = {
    "int8": [(32, 48), (64, 40), (40, 32, 3, 3), (32, 32, 1, 1)],
    "fp8": [(32, 48), (64, 40), (40, 32, 3, 3), (32, 32, 1, 1)],
    "int4": [(48, 128), (64, 256)],
}
LAYOUTS = ["as it is", "axes reversed", "channels last"]


@given(
    st.sampled_from([(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]),
    st.sampled_from(LAYOUTS),
    st.integers(0, 1000),
    st.integers(1, 5000),
)
def test_weights_of_a_byte_or_less_are_found_in_every_layout(
    wanted: tuple[str, tuple[int, ...]], layout: str, seed: int, piece_bytes: int
) -> None:
    kind, shape = wanted
    array = make_weight(kind, shape, seed)
    placed = array
    if layout == "axes reversed":
        placed = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    elif layout == "channels last" and array.ndim == 4:
        placed = array.transpose(0, 2, 3, 1)
    search = search_for(kind, [array])
    assert search.sampled == 1
    plan = bytes(64) + place(kind, placed)
    for start in range(0, len(plan), piece_bytes):
        search.feed(plan[start : start + piece_bytes])
    assert search.found == 1


@pytest.mark.parametrize("kind", list(_CODES))
def test_quantised_weights_that_were_lost_or_changed_are_not_found(kind: str) -> None:
    arrays = [make_weight(kind, shape, number) for number, shape in enumerate(SHAPES[kind])]
    whole = b"".join(place(kind, array) for array in arrays)
    others = b"".join(place(kind, make_weight(kind, array.shape, number + 50)) for number, array in enumerate(arrays))
    widened = np.concatenate([array.reshape(-1) for array in arrays]).view(np.int8).astype(np.float16).tobytes()
    for plan in (bytes(len(whole)), others, widened):
        search = search_for(kind, arrays)
        search.feed(plan)
        assert (search.sampled, search.found) == (len(arrays), 0)


@pytest.mark.parametrize("kind", list(_CODES))
def test_a_quantised_weight_without_a_pattern_is_not_looked_for(kind: str) -> None:
    assert search_for(kind, [np.zeros(SHAPES[kind][0], np.uint8)]).sampled == 0
    assert search_for(kind, [make_weight(kind, (16, 128), 1)]).sampled == 0  # too few outputs for a pattern of columns
