"""The kernels of a TensorRT-RTX plan, from the text that the plan itself holds: evidence where no GPU can load it.

Before the weights lies a text with a line for each tensor and each kernel: the tensors that a kernel takes, their
types, and the nodes of the graph that it computes. NVIDIA documents none of it (read from TensorRT-RTX 1.7), so a plan
without such a text, or with another, gives no kernels and nothing is claimed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdopt.backends.tensorrt.inspector import is_attention
from sdopt.model.quantization import Scheme

_MAGIC = b"NLYM"
_PREFIX_BYTES = 16  # the magic, four bytes, the text's length
# The whole graph's text is there, and those of single fused kernels, which repeat what it says, end otherwise.
_WHOLE_GRAPH = "\nshape_main {"
# The text comes before the kernels and the weights: in the plan of SD1.5's UNet after 90 kilobytes.
_SEARCHED_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20

_TENSOR = re.compile(r'^ *(?:sub_)?tensor=\{ .*?\bname="([^"]*)".*\btype=(\w+) \}$', re.MULTILINE)
_KERNEL = re.compile(r"^ *(corrltn|fully_connected|runtime_fusion|function)=\{ (.*) \}$", re.MULTILINE)
_INPUTS = re.compile(r"\binput(?:_args)?=\{([^}]*)\}")
_NAME = re.compile(r'\bname="?([^" ]+)')
_QUOTED = re.compile(r'"([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPES = {"half": "fp16", "float": "fp32", "bfloat": "bf16", "fp8_e4m3": "fp8"}
_QUANTIZED = ("int8", "fp8", "int4")


@dataclass(frozen=True)
class Kernel:
    """`kind` is convolution, matmul or attention; `types` are of its operands, as far as they are told apart."""

    kind: str
    types: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def quantized_operands(self) -> int:
        return sum(name in _QUANTIZED for name in self.types)

    def __str__(self) -> str:
        """As in `matmul int8` or, where a kernel widens one operand as it reads it, `matmul fp16 x int8`."""
        few = next((name for name in self.types if name in _QUANTIZED), "")
        wide = next((name for name in self.types if name not in _QUANTIZED), "")
        if self.quantized_operands == 1 and wide:
            return f"{self.kind} {wide} x {few}"
        return f"{self.kind} {few or wide}"


def read_kernels(plan: Path) -> tuple[Kernel, ...]:
    """Of the first optimisation profile; none where the plan has no text that can be read."""
    text = _find_text(plan)
    types = {name: _TYPES.get(kind, kind) for name, kind in _TENSOR.findall(text)}
    return tuple(_list_kernels(text, types))


def count_kernels(kernels: Iterable[Kernel]) -> dict[str, int]:
    return dict(sorted(Counter(str(kernel) for kernel in kernels).items()))


def count_attention(kernels: Collection[Kernel]) -> int | None:
    """Kernels that compute a whole attention layer each; None where no kernel could be read."""
    return sum(kernel.kind == "attention" for kernel in kernels) if kernels else None


def find_widened(kernels: Iterable[Kernel], nodes: Mapping[str, tuple[str, Scheme]]) -> tuple[str, ...]:
    """The quantised layers whose kernels take 16 bits: the plan widens them first, and they are not faster for it.

    `nodes` has the node of the graph and the scheme of each layer. A layer that no kernel names is not counted.
    """
    operands: dict[str, int] = {}
    for kernel in kernels:
        for node in kernel.nodes if kernel.kind != "attention" else ():
            operands[node] = max(operands.get(node, 0), kernel.quantized_operands)
    return tuple(
        layer
        for layer, (node, scheme) in nodes.items()
        if node in operands and operands[node] < (2 if scheme.quantizes_activations else 1)
    )


def _find_text(plan: Path) -> str:
    """The text of the whole graph; empty where there is none."""
    with plan.open("rb") as file:
        for place in _find_magic(plan):
            file.seek(place)
            length = int.from_bytes(file.read(_PREFIX_BYTES)[8:], "little")
            if length < _SEARCHED_BYTES:
                text = file.read(length).decode("latin-1")
                if text.startswith("header {") and _WHOLE_GRAPH in text:
                    return text
    return ""


def _find_magic(plan: Path) -> Iterator[int]:
    with plan.open("rb") as file:
        tail, start = b"", 0
        while start < _SEARCHED_BYTES and (piece := file.read(_PIECE_BYTES)):
            data = tail + piece
            place = data.find(_MAGIC)
            while place >= 0:
                yield start - len(tail) + place
                place = data.find(_MAGIC, place + 1)
            start, tail = start + len(piece), data[1 - len(_MAGIC) :]


def _list_kernels(text: str, types: Mapping[str, str]) -> Iterator[Kernel]:
    for call, line in _KERNEL.findall(text):
        name, inputs = _NAME.search(line), _INPUTS.search(line)
        if inputs is None:
            continue
        operands = [types.get(each, "unknown") for each in _QUOTED.findall(inputs[1])]
        nodes = frozenset(_NODE.findall(line))
        if call == "corrltn":
            yield Kernel("convolution", tuple(operands[:2]), nodes)
        elif call == "fully_connected":
            yield Kernel("matmul", tuple(operands[:2]), nodes)
        elif call == "runtime_fusion" and "backbone=gemm" in line:
            # Its operands stand in any order, among them what is added to the product.
            yield Kernel("matmul", tuple(operands), nodes)
        elif call == "function" and name is not None and is_attention(name[1]):
            yield Kernel("attention", tuple(operands[:1]), nodes)
