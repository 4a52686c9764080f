"""What is in a network and in its plan, beside what was asked for. A build can succeed and be wrong.

Without a GPU no inspector can look into a plan, so the evidence is: the layers of the network that the builder was
given, the kernels that the plan's own text lists where it has one (`plan_text.py`), and the bytes of the plan, which
must hold the weights of the graph and must not be full of zeros. Attention is counted among the kernels. Where none can
be read, the builder's word stands for them: attention that may not be decomposed has a dedicated kernel, or the build
fails. TensorRT-RTX 1.7 does not always keep it: where heads have 8 numbers or more than 256, in fp32, and for a single
head of a single picture it may write attention out and say nothing. Which kernels took quantised operands is shown, not
judged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt.backends.tensorrt.loading import Kind
from sdopt.backends.tensorrt.quantized import QuantizedLayers
from sdopt.bundle.records import PlanAudit
from sdopt.errors import AuditError
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme
from sdopt.weights.dtypes import BY_TENSORRT

# A plan holds each weight once, plus layers and kernels; text position tables and the like may be folded away.
_LEAST_BYTES_SHARE = 0.9
# Random and trained weights have well under 1 % of zero bytes; what is pruned is so in weights and plan alike.
_MOST_ADDED_ZEROS = 0.1
# All but the projections of queries and keys are there, a third of a text encoder's matrices and less elsewhere.
_LEAST_FOUND_SHARE = 0.4
# All were there in every plan that was seen.
_LEAST_QUANTIZED_FOUND_SHARE = 0.75
_NAMES_SHOWN = 5
_COMPUTE = {
    "CONVOLUTION": "convolution", "DECONVOLUTION": "convolution", "MATRIX_MULTIPLY": "matmul",
    "ATTENTION_INPUT": "attention", "NORMALIZATION": "normalization",
}  # fmt: skip
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class NetworkAudit:
    """What a network says of itself before it is built. `softmax` are the names of attention written out.

    `attention_fused` is the builder's promise: there is attention, and none of it may be decomposed.

    `quantized` has the node and the scheme of each layer that is quantised as was asked for; `unquantized` names the
    others that were asked for, with what they are instead.
    """

    attention_native: int
    attention_fused: bool
    compute_layers: dict[str, int]
    other_precision: tuple[str, ...]
    softmax: tuple[str, ...]
    quantized: dict[str, tuple[str, Scheme]] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()


def audit_network(
    network: Any, library: Any, precision: Precision, wanted: Mapping[str, Scheme] | None = None
) -> NetworkAudit:
    """Count attention and precision layer by layer. A layer computes in the type of its first input, and a quantised
    layer is counted by its scheme. `wanted` are the layers that were to be quantised: what else is, is not as asked.
    """
    wanted = wanted or {}
    layers = list(_layers(network))
    look = QuantizedLayers(layers)
    counts: Counter[str] = Counter()
    other: list[str] = []
    quantized: dict[str, tuple[str, Scheme]] = {}
    instead: dict[str, str] = {}
    for layer in layers:
        kind, name, found = layer.type.name, _name_of(layer), look.at(layer)
        if found is not None and found.name not in wanted:
            other.append(f"{name} ({found.text})")
        elif found is not None and found.scheme is wanted[found.name]:
            quantized[found.name] = name, found.scheme
        elif found is not None:
            instead[found.name] = found.text
        if kind in _COMPUTE:
            given = layer.get_input(0).dtype.name
            computes_in = BY_TENSORRT.get(given, given.lower())
            counts[f"{_COMPUTE[kind]} {found.text if found else computes_in}"] += 1
            if computes_in != precision:
                other.append(f"{name} ({computes_in})")
    attention = list(_attention(network, library))
    return NetworkAudit(
        attention_native=len(attention),
        attention_fused=bool(attention) and not any(each.decomposable for each in attention),
        compute_layers=dict(sorted(counts.items())),
        other_precision=tuple(other),
        softmax=tuple(_name_of(layer) for layer in layers if layer.type.name == "SOFTMAX"),
        quantized=quantized,
        unquantized=tuple(
            f"{name} ({instead.get(name, 'not quantised')}, not {scheme})"
            for name, scheme in wanted.items()
            if name not in quantized
        ),
    )


def allow_decomposed_attention(network: Any, library: Any) -> None:
    """Let the builder write attention out where it has no dedicated kernel for its shape: slower, and audited so."""
    for attention in _attention(network, library):
        attention.decomposable = True


def judge_plan(
    kind: Kind, component: str, audit: PlanAudit, network: NetworkAudit, precision: Precision, *, require_fused: bool,
    native: bool,
) -> None:  # fmt: skip
    """Raise `AuditError` for a plan that is not what was asked for, naming the layers.

    `native` says that the graph was written with one attention node for each layer of torch's.
    """
    if audit.plan_bytes < _LEAST_BYTES_SHARE * audit.weights_bytes:
        raise AuditError(
            f"the plan of {component} lost weights: it has {audit.plan_bytes:,} bytes, and the graph's weights "
            f"{audit.weights_bytes:,}",
            hint=_REPORT,
        )
    if audit.zero_share > audit.weights_zero_share + _MOST_ADDED_ZEROS:
        raise AuditError(
            f"the plan of {component} lost weights: {audit.zero_share:.0%} of its bytes are zero, and "
            f"{audit.weights_zero_share:.0%} of the weights'",
            hint=_REPORT,
        )
    if kind == "tensorrt-rtx" and audit.weights_found < _LEAST_FOUND_SHARE * audit.weights_sampled:
        raise AuditError(
            f"the plan of {component} lost weights: of {audit.weights_sampled} that were looked for in it, "
            f"{audit.weights_found} are there",
            hint=_REPORT,
        )
    if kind == "tensorrt-rtx" and audit.quantized_found < _LEAST_QUANTIZED_FOUND_SHARE * audit.quantized_sampled:
        raise AuditError(
            f"the plan of {component} lost weights: of {audit.quantized_sampled} quantised ones that were looked for "
            f"in it, {audit.quantized_found} are there",
            hint=_REPORT,
        )
    if network.unquantized:
        count = len(network.unquantized) + len(network.quantized)
        raise AuditError(
            f"{component} was to have {count} quantised layers, and {len(network.unquantized)} of them are otherwise: "
            f"{_list_names(network.unquantized)}",
            hint=_REPORT,
        )
    if audit.other_precision:
        raise AuditError(
            f"{component} was to compute in {precision}, and {len(audit.other_precision)} layers do not: "
            f"{_list_names(audit.other_precision)}",
            hint=_REPORT,
        )
    if audit.attention_native != audit.attention_layers and (native or require_fused):
        raise AuditError(
            f"{component} has {audit.attention_layers} attention layers in torch and {audit.attention_native} in its "
            f"network; written out: {_list_names(network.softmax)}",
            hint='leave out dialect = "opset18", which writes attention out',
        )
    if require_fused and audit.attention_layers and not audit.attention_fused:
        fused = "not all" if audit.fused_kernels is None else f"{audit.fused_kernels} of {audit.attention_layers}"
        raise AuditError(
            f"attention in {component} is not fused: {fused} layers have a dedicated kernel, and there is none for the "
            "head size, the shapes or the precision of the others",
            hint=FUSED_HINT,
        )


FUSED_HINT = (
    "leave out --require-fused, or build in fp16 or bf16 and for static sizes: TensorRT-RTX 1.7 has kernels for heads "
    "of 16 to 256 numbers in 16 bits"
)
_REPORT = "this is a defect of TensorRT or of sdopt: please report it with sdopt inspect --json of the graph"


def _list_names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown or "none"


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _attention(network: Any, library: Any) -> Iterator[Any]:
    for layer in _layers(network):
        if layer.type.name == "ATTENTION_INPUT":
            # The network gives base classes; what belongs to a kind of layer is reached through its own.
            layer.__class__ = library.IAttentionInputLayer
            yield layer.attention


def _name_of(layer: Any) -> str:
    """The node of the graph that a layer comes from; the layer's own name where the parser says none."""
    match = _NODE.search(layer.metadata)
    return match[1] if match else str(layer.name)
