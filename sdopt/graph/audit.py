"""What a graph says of itself: its nodes, its attention, and whether its external data is where it may be."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from sdopt.bundle.records import GraphAudit
from sdopt.errors import ArtifactError


def audit_graph(model: ir.Model, attention_layers: int) -> GraphAudit:
    """Count nodes and attention. With the opset 18 dialect an attention layer has one `Softmax` instead."""
    counts = Counter(node.op_type for node in model.graph)
    opset = model.opset_imports[""]
    attention = counts["Attention"] if opset >= 23 else counts["Softmax"]
    return GraphAudit(
        opset=opset, nodes=sum(counts.values()), attention_nodes=attention, attention_layers=attention_layers
    )


def require_fused_attention(name: str, audit: GraphAudit) -> None:
    """Raise `ArtifactError` where the graph has not one attention node for each attention layer of torch."""
    if audit.attention_nodes != audit.attention_layers:
        raise ArtifactError(
            f"{name} has {audit.attention_layers} attention layers in torch and {audit.attention_nodes} in its graph",
            hint="this is a defect of the tracer: please report it with the model's config.json",
        )
