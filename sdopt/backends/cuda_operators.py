"""What ONNX Runtime's CUDA provider needs to be told about a graph, so that it is right and fast.

Measured with 1.31 on an H200 (benchmarks/reports/cuda-step-h200.json). Its flash attention is wrong for some widths of
heads: an error of 25 % in SD1.5's UNet, with 40, 80 and 160 numbers, of which nobody has looked at each, and of 0.3 %
in SDXL's, with 64. It has no kernel for `GroupNormalization`, which it takes apart into a dozen operators over
the whole image, but one of its own for channels last, with the SiLU after it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

# The bits of the provider's `sdpa_kernel`: memory-efficient attention alone, which was right for each width seen.
_EFFICIENT = "2"
# Wider heads never get to flash attention.
_WIDEST_FLASH_HEAD = 256
_RIGHT_FLASH_HEADS = frozenset({64})
# Its kernel refuses narrow images of few channels. These were run: 128 to 2560 channels in 32 groups.
_GROUPS, _LEAST_CHANNELS = 32, 128
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


class CudaGraph:
    """A graph without its weights, which stay in their file."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        self._shapes = {
            each.name: tuple(size.dim_value for size in each.type.tensor_type.shape.dim)
            for each in (*inferred.value_info, *inferred.input)
        }

    @property
    def _half(self) -> bool:
        """Graphs in fp32 were not run with other operators than their own."""
        return bool(self.model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16)

    def provider_options(self) -> dict[str, str]:
        """For channels last throughout, and for attention that is right."""
        options = {"prefer_nhwc": "1"} if self._half else {}
        widths = {(self._shapes.get(node.input[0]) or (0,))[-1] for node in self.model.graph.node
                  if node.op_type == "Attention"}  # fmt: skip
        if any(width <= _WIDEST_FLASH_HEAD for width in widths - _RIGHT_FLASH_HEADS):
            options["sdpa_kernel"] = _EFFICIENT
        return options

    def fuse_group_norms(self) -> int:
        """Put the provider's `GroupNorm` in the place of those that it can do. Returns how many."""
        graph = self.model.graph
        nodes = list(graph.node)
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        fused: dict[int, list[onnx.NodeProto]] = {}
        shown = {each.name for each in graph.output}
        dropped: set[int] = set()
        for node in nodes:
            if not self._is_fusible(node):
                continue
            normal = node.output[0]
            result, silu = normal, _find_silu(readers.get(normal, [])) if normal not in shown else None
            if silu is not None:
                dropped |= {id(each) for each in silu}
                result = silu[1].output[0]
            fused[id(node)] = _make_group_norm(node, result, activation=int(silu is not None))
        # What reads a product comes after it, and so after the norm whose place the fused operator takes.
        kept = [new for node in nodes if id(node) not in dropped for new in fused.get(id(node), [node])]
        del graph.node[:]
        graph.node.extend(kept)
        if fused:
            self.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return len(fused)

    def _is_fusible(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "GroupNormalization" or not self._half:
            return False
        shape = self._shapes.get(node.input[0], ())
        groups = _attribute(node, "num_groups")
        return len(shape) == 4 and groups == _GROUPS and shape[1] >= _LEAST_CHANNELS and shape[1] % groups == 0


def _find_silu(readers: list[onnx.NodeProto]) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The sigmoid and the product of `x * sigmoid(x)`, where nothing else reads x."""
    if len(readers) != 2:
        return None
    sigmoid, product = sorted(readers, key=lambda node: node.op_type == "Mul")
    if (sigmoid.op_type, product.op_type) != ("Sigmoid", "Mul"):
        return None
    return (sigmoid, product) if set(product.input) == {sigmoid.input[0], sigmoid.output[0]} else None


def _make_group_norm(node: onnx.NodeProto, result: str, *, activation: int) -> list[onnx.NodeProto]:
    values, scale, bias = node.input
    at = f"{node.output[0]}/channels_last"
    epsilon = _attribute(node, "epsilon")
    return [
        # It takes both in fp32, whatever the image has.
        helper.make_node("Cast", [scale], [f"{at}/scale"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [bias], [f"{at}/bias"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", [values], [f"{at}/input"], perm=_TO_LAST),
        helper.make_node(
            "GroupNorm", [f"{at}/input", f"{at}/scale", f"{at}/bias"], [f"{at}/output"], name=node.name,
            domain="com.microsoft", epsilon=1e-5 if epsilon is None else epsilon, groups=_attribute(node, "num_groups"),
            activation=activation, channels_last=1,
        ),
        helper.make_node("Transpose", [f"{at}/output"], [result], perm=_TO_FIRST),
    ]  # fmt: skip


def _attribute(node: onnx.NodeProto, name: str) -> int | float | None:
    value: int | float | None = next(
        (helper.get_attribute_value(each) for each in node.attribute if each.name == name), None
    )
    return value
