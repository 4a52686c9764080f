"""LoRA slots in a bound graph: y = W x + B (A x), with A and B as inputs whose rank is a symbolic axis of each layer.

No weight is read or moved: the graph with slots and the one without lie over the same weight file.
A layer that is quantised already keeps its slot in 16 bits: the branch takes what goes into its Q/DQ.

A linear layer's branch is two products. A convolution of 1x1 is two products from the left over [n, channels, pixels].
A larger one is one product with all of the kernel's taps, then a convolution with constant one-hot weights that adds
the shifted taps up: OpenVINO and TensorRT take no convolution whose weights are inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdopt.graph.sites import WeightSite, find_sites
from sdopt.model.slots import Slot, SlotSet, input_names, wants_slot

_CONV_ATTRIBUTES = ("pads", "strides", "dilations", "auto_pad")


def add_slots(model: ir.Model, layers: SlotSet) -> tuple[Slot, ...]:
    """Give each layer of the set a slot, in place; returns them in the order of the graph's inputs.

    The inputs have the type that the layer computes in. What rank they have without an adapter is for
    whoever runs the graph: ONNX Runtime 1.31 leaves memory uninitialised in a convolution of 0 rows.
    """
    maker = _Maker(model.graph)
    slots = []
    for number, site in enumerate(list(_slot_sites(model.graph, layers))):
        output = _after_bias(site)
        users = list(output.uses())  # without the branch, which may ask for the output's shape
        branch = maker.branch(site, f"lora_rank_{number}")
        total = maker.node("Add", [output, branch], f"{site.layer.name}.lora_sum", output)
        for user, index in users:
            user.replace_input_with(index, total)
        _replace_output(model.graph, output, total)
        slots.append(Slot(site.layer.name, site.layer.shape))
    common.TopologicalSortPass()(model)
    return tuple(slots)


def _slot_sites(graph: ir.Graph, layers: SlotSet) -> Iterable[WeightSite]:
    return (site for site in find_sites(graph) if _takes_slot(site) and wants_slot(layers, site.layer.name))


def _takes_slot(site: WeightSite) -> bool:
    """No table; no convolution by groups, and no 1x1 one with strides, which no Stable Diffusion network has."""
    attributes = site.node.attributes
    strides = attributes.get_ints("strides", [1, 1]) if site.layer.op == "Conv" else [1, 1]
    pointwise = math.prod(site.layer.shape[2:]) == 1
    return site.layer.op != "Gather" and attributes.get_int("group", 1) == 1 and not (pointwise and max(strides) > 1)


def _before_quantization(site: WeightSite) -> ir.Value:
    """What the layer is given, without the rounding of `insert_qdq` and its smoothing."""
    x = site.node.inputs[0]
    assert x is not None
    dequantize = x.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return x
    quantize = dequantize.inputs[0]
    assert quantize is not None
    producer = quantize.producer()
    assert producer is not None
    value = producer.inputs[0]
    assert value is not None
    smoothing = value.producer()
    if smoothing is not None and value.name == f"{site.layer.name}.smoothed":
        value = smoothing.inputs[0]
        assert value is not None
    return value


def _after_bias(site: WeightSite) -> ir.Value:
    """The layer's output, behind its bias: runtimes fuse a product with its bias, and would not across a sum."""
    output = site.node.outputs[0]
    uses = list(output.uses())
    if site.node.op_type == "MatMul" and len(uses) == 1 and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        producer = other.producer() if other is not None else None
        if producer is not None and producer.op_type == "Cast":
            other = producer.inputs[0]
        if other is not None and other.is_initializer():
            return uses[0].node.outputs[0]
    return output


def _replace_output(graph: ir.Graph, output: ir.Value, total: ir.Value) -> None:
    for place, value in enumerate(graph.outputs):
        if value is output:
            # The graph's output keeps its name, and what the layer gave by itself gets another.
            assert output.name is not None
            total.name, output.name = output.name, f"{output.name}.without_lora"
            graph.outputs[place] = total


class _Maker:
    """Nodes and constants of the branches. Constants are shared by all of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants: dict[str, ir.Value] = {}

    def branch(self, site: WeightSite, rank: str) -> ir.Value:
        """B (A x) of a layer, in the shape of its output. `rank` is the name of the symbolic axis."""
        x = _before_quantization(site)
        return self._convolution(site, x, rank) if site.layer.op == "Conv" else self._linear(site, x, rank)

    def _linear(self, site: WeightSite, x: ir.Value, rank: str) -> ir.Value:
        (out_width, in_width), y = site.layer.shape, site.node.outputs[0]
        a, b = self._inputs(site, (in_width, rank), (rank, out_width))
        down = self.node("MatMul", [x, a], f"{site.layer.name}.lora_down", y, shape=None)
        return self.node("MatMul", [down, b], f"{site.layer.name}.lora_up", y)

    def _convolution(self, site: WeightSite, x: ir.Value, rank: str) -> ir.Value:
        name, y = site.layer.name, site.node.outputs[0]
        out_channels, in_channels, *kernel = site.layer.shape
        taps = math.prod(kernel)
        a_shape = (rank, in_channels) if taps == 1 else (taps, rank, in_channels)
        a, b = self._inputs(site, a_shape, (out_channels, rank))
        flat = self.node("Reshape", [x, self._whole([0, in_channels, -1])], f"{name}.lora_flat", y, shape=None)
        if taps == 1:
            down = self.node("MatMul", [a, flat], f"{name}.lora_down", y, shape=None)
        else:
            down = self._shifted(site, x, a, flat, kernel)
        up = self.node("MatMul", [b, down], f"{name}.lora_up", y, shape=None)
        shape = self._shape_of(y, 0, f"{name}.lora_output_shape")
        return self.node("Reshape", [up, shape], f"{name}.lora_picture", y)

    def _shifted(self, site: WeightSite, x: ir.Value, a: ir.Value, flat: ir.Value, kernel: list[int]) -> ir.Value:
        """A applied to every tap of the kernel: [n, rank, pixels of the output]."""
        name, y, taps, in_channels = site.layer.name, site.node.outputs[0], math.prod(kernel), site.layer.shape[1]
        # [taps, rank, in] -> rows (rank, taps): the taps of one row are the channels of one picture.
        rows = self.node("Transpose", [a], f"{name}.lora_rows", y, shape=None, perm=[1, 0, 2])
        rows = self.node("Reshape", [rows, self._whole([-1, in_channels])], f"{name}.lora_taps", y, shape=None)
        every = self.node("MatMul", [rows, flat], f"{name}.lora_every", y, shape=None)
        sides = self._shape_of(x, 2, f"{name}.lora_sides")
        picture = self._join([self._whole([-1, taps]), sides], f"{name}.lora_picture_shape")
        pictures = self.node("Reshape", [every, picture], f"{name}.lora_pictures", y, shape=None)
        attributes = {key: site.node.attributes[key].value for key in _CONV_ATTRIBUTES if key in site.node.attributes}
        one_hot = self._one_hot(kernel, y.dtype)
        shifted = self.node(
            "Conv", [pictures, one_hot], f"{name}.lora_shift", y, shape=None, kernel_shape=kernel, **attributes
        )
        rows_of = self._shape_of(x, 0, f"{name}.lora_batch", end=1)
        flat_shape = self._join([rows_of, self._whole([-1]), self._pixels_of(y, name)], f"{name}.lora_down_shape")
        return self.node("Reshape", [shifted, flat_shape], f"{name}.lora_down", y, shape=None)

    def _inputs(
        self, site: WeightSite, a_shape: tuple[int | str, ...], b_shape: tuple[int | str, ...]
    ) -> tuple[ir.Value, ir.Value]:
        dtype = site.node.outputs[0].dtype
        assert dtype is not None
        made = []
        for name, shape in zip(input_names(site.layer.name), (a_shape, b_shape), strict=True):
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self._graph.inputs.append(value)
            made.append(value)
        return made[0], made[1]

    def node(
        self, op: str, inputs: list[ir.Value], name: str, like: ir.Value, *, shape: ir.Shape | str | None = "same",
        **attributes: int | list[int],
    ) -> ir.Value:  # fmt: skip
        """A node whose output has the type of `like`, and its shape where no other is given."""
        node = ir.node(op, inputs, attributes, name=f"{name}_{op}")
        output = node.outputs[0]
        output.name, output.dtype = name, like.dtype
        output.shape = like.shape if isinstance(shape, str) else shape
        self._graph.append(node)
        return output

    def _shape_of(self, value: ir.Value, start: int, name: str, *, end: int = 4) -> ir.Value:
        """The sides of a picture [n, channels, height, width] from `start`, int64; a constant where they are known."""
        assert value.shape is not None
        sides = [side for side in value.shape][start:end]
        if all(isinstance(side, int) for side in sides):
            return self._whole([int(side) for side in sides])
        return self._int64("Shape", [value], name, start=start, end=end)

    def _pixels_of(self, y: ir.Value, name: str) -> ir.Value:
        assert y.shape is not None
        height, width = y.shape[2], y.shape[3]
        if isinstance(height, int) and isinstance(width, int):
            return self._whole([height * width])
        sides = self._shape_of(y, 2, f"{name}.lora_output_sides")
        return self._int64("ReduceProd", [sides], f"{name}.lora_pixels", keepdims=1)

    def _join(self, parts: list[ir.Value], name: str) -> ir.Value:
        if all(part.const_value is not None for part in parts):
            return self._whole([int(n) for part in parts for n in part.const_value.numpy()])
        return self._int64("Concat", parts, name, axis=0)

    def _int64(self, op: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{name}_{op}")
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.INT64
        self._graph.append(node)
        return node.outputs[0]

    def _whole(self, numbers: list[int]) -> ir.Value:
        return self._constant("lora_sides_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def _one_hot(self, kernel: list[int], dtype: ir.DataType | None) -> ir.Value:
        """[1, taps, height, width]: tap k is read at its own place of the kernel."""
        assert dtype is not None
        taps = math.prod(kernel)
        name = f"lora_taps_{'x'.join(map(str, kernel))}_{dtype.name.lower()}"
        return self._constant(name, np.eye(taps, dtype=np.float32).reshape(1, taps, *kernel).astype(dtype.numpy()))

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.initializers[name] = value
            self._constants[name] = value
        return self._constants[name]
