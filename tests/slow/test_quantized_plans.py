"""Real TensorRT-RTX plans of quantised graphs, built without a GPU: every scheme is in the plan, and faults are named.

The graphs are tiny-shapes' with the layers quantised as `sdopt convert` does it; its scales are not calibrated, because
no picture is drawn.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from sdopt.backends.tensorrt import parsed_network as network
from sdopt.backends.tensorrt.weight_search import WeightSearch
from sdopt.bundle.manifest import read_manifest
from sdopt.bundle.records import PlanAudit
from sdopt.convert.blocks.write import StockJob, find_layers, publish_choice, stock_layers
from sdopt.convert.plans.build import JOB, PlanJob, Rung, build_in_child
from sdopt.convert.plans.wanted import profile_tables
from sdopt.errors import AuditError, BackendError
from sdopt.graph.qdq import LayerChoice, takes
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import Scheme
from sdopt.weights.safetensors_header import read_header

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)

KEEP = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj", "*.conv_shortcut", "*embedding")
"""As in configs/quantization/int8.toml."""
ATTENTION_KERNELS = 8
"""Of the UNet's 14 layers: TensorRT-RTX 1.7 has none for heads of 8 numbers, quantised or not."""


@dataclass(frozen=True)
class Quantized:
    """A component's graph and weights, with the layers that are quantised in them."""

    bundle: Path
    component: ComponentName
    folder: Path
    schemes: dict[str, Scheme]

    def job(self, **changes: Any) -> dict[str, Any]:
        manifest = read_manifest(self.bundle)
        audit = manifest.components[self.component].audit
        values: dict[str, Any] = {
            "kind": "tensorrt-rtx", "component": self.component, "precision": Precision.FP16,
            "graph": self.folder / "model.onnx", "weights": self.folder / "weights.safetensors",
            "output": self.folder / "engine.plan", "generation": "sm89",
            "profiles": profile_tables(manifest, self.component),
            "attention_layers": audit.attention_layers, "native": True, "require_fused": False, "rung": Rung("a test"),
            "memory_limit_bytes": None, "timing_cache": None, "quantized": self.schemes,
        }  # fmt: skip
        dumped: dict[str, Any] = JOB.dump_python(PlanJob(**{**values, **changes}), mode="json")
        return dumped

    def build(self, **changes: Any) -> PlanAudit:
        return PlanAudit.model_validate(build_in_child(self.job(**changes))["audit"])

    def save(self, model: onnx.ModelProto) -> None:
        onnx.save(model, self.folder / "model.onnx")

    def load(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "model.onnx", load_external_data=False)


def quantise(
    bundle: Path, folder: Path, scheme: Scheme, component: ComponentName = ComponentName.UNET,
    keep: Collection[str] = KEEP,
) -> Quantized:  # fmt: skip
    stock_folder = folder / "stock"
    stock_folder.mkdir()
    for name in ("model.onnx", "weights.safetensors"):
        shutil.copy(bundle / component / name, stock_folder)
    layers = find_layers(stock_folder)
    choices = {
        name: LayerChoice(scheme)
        for name, layer in layers.items()
        if takes(layer, scheme) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
    }
    scales = stock_folder / "scales.safetensors"
    save_file({f"{name}.input_amax": torch.tensor(4.0) for name in choices}, scales)
    tensors = read_header(stock_folder / "weights.safetensors").tensors
    stock = stock_layers(StockJob(stock_folder, DType.FP16, choices, tensors, scales))
    publish_choice(stock, folder / "made", choices, "quantising")
    return Quantized(bundle, component, folder / "made", dict.fromkeys(choices, scheme))


@pytest.fixture
def bundle(rtx_bundle: tuple[Path, Path]) -> Path:
    return rtx_bundle[1]


@pytest.mark.parametrize("scheme", list(Scheme))
def test_every_scheme_is_in_the_plan(scheme: Scheme, bundle: Path, tmp_path: Path) -> None:
    graph = quantise(bundle, tmp_path, scheme)
    audit = graph.build()
    assert audit.quantized_layers == len(graph.schemes) > (80 if scheme is not Scheme.INT4_WEIGHTS else 5)
    counted = sum(count for kind, count in audit.compute_layers.items() if kind.endswith(f" {scheme}"))
    assert counted == audit.quantized_layers
    assert audit.other_precision == ()
    assert audit.quantized_found == audit.quantized_sampled >= 4
    assert audit.weights_found >= audit.weights_sampled / 2
    assert audit.zero_share < 0.05
    weights_bytes = (graph.folder / "weights.safetensors").stat().st_size
    assert weights_bytes - 100_000 < audit.weights_bytes <= weights_bytes


@pytest.mark.parametrize(("scheme", "kind"), [(Scheme.INT8, "int8"), (Scheme.FP8, "fp8")])
def test_the_plan_computes_in_the_type_itself(scheme: Scheme, kind: str, bundle: Path, tmp_path: Path) -> None:
    """Its own list of kernels says so: layers that share an input are one kernel, and none is widened."""
    audit = quantise(bundle, tmp_path, scheme).build()
    assert audit.kernels[f"convolution {kind}"] == audit.compute_layers[f"convolution {scheme}"]
    assert audit.kernels[f"matmul {kind}"] >= audit.compute_layers[f"matmul {scheme}"] / 3
    assert audit.widened_layers == ()
    assert audit.fused_kernels == ATTENTION_KERNELS


def test_weights_alone_are_widened_by_the_kernel_or_before_it(bundle: Path, tmp_path: Path) -> None:
    """Matrix products read INT8 weights; convolutions get them widened first, and the audit names these."""
    graph = quantise(bundle, tmp_path, Scheme.INT8_WEIGHTS)
    audit = graph.build()
    assert audit.kernels["matmul fp16 x int8"] == audit.compute_layers["matmul int8-weights"]
    assert not any(kind.endswith(" int8") and " x " not in kind for kind in audit.kernels)
    assert len(audit.widened_layers) == audit.compute_layers["convolution int8-weights"]
    assert set(audit.widened_layers) < graph.schemes.keys()


def test_a_generation_without_a_kernel_is_seen(bundle: Path, tmp_path: Path) -> None:
    """sm75 has INT8 matrix products; its INT8 convolutions are computed in fp16."""
    audit = quantise(bundle, tmp_path, Scheme.INT8).build(generation="sm75")
    assert audit.kernels["matmul int8"] > 0
    assert "convolution int8" not in audit.kernels
    assert len(audit.widened_layers) == audit.compute_layers["convolution int8"]


@pytest.mark.parametrize(
    ("scheme", "generation", "kind"), [(Scheme.FP8, "sm86", "fp8"), (Scheme.INT4_WEIGHTS, "sm75", "int4")]
)
def test_what_the_planner_refuses_by_name_cannot_be_built(
    scheme: Scheme, generation: str, kind: str, bundle: Path, tmp_path: Path
) -> None:
    """The table of first generations in `sdopt.convert.plans.wanted` says what the library does."""
    with pytest.raises(BackendError, match=f"HW-specific datatypes: {kind}"):
        quantise(bundle, tmp_path, scheme).build(generation=generation)


def test_a_layer_that_lacks_its_qdq_is_refused_and_named(bundle: Path, tmp_path: Path) -> None:
    absent = "mid_block.attentions.0.proj_out"
    graph = quantise(bundle, tmp_path, Scheme.INT8, keep=(*KEEP, absent))
    with pytest.raises(AuditError, match=rf"1 of them are otherwise: {absent} \(not quantised, not int8\)"):
        graph.build(quantized={**graph.schemes, absent: Scheme.INT8})


def test_an_input_that_lacks_its_qdq_is_refused_and_named(bundle: Path, tmp_path: Path) -> None:
    """Its weight is quantised, so the plan has as few bytes as it should."""
    graph = quantise(bundle, tmp_path, Scheme.INT8)
    model = graph.load()
    producers = {output: node for node in model.graph.node for output in node.output}
    node = next(
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] == "mid_block.attentions.0.proj_in.dequantized"
    )
    node.input[0] = producers[producers[node.input[0]].input[0]].input[0]
    graph.save(model)
    with pytest.raises(AuditError, match=r"mid_block\.attentions\.0\.proj_in \(int8-weights, not int8\)"):
        graph.build()


def test_a_layer_that_nobody_asked_for_is_refused_and_named(bundle: Path, tmp_path: Path) -> None:
    graph = quantise(bundle, tmp_path, Scheme.INT8)
    del graph.schemes["mid_block.attentions.0.proj_in"]
    with pytest.raises(AuditError, match=r"to compute in fp16, and 1 layers do not: node_\w+ \(int8\)"):
        graph.build()


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_plan_that_lost_its_quantised_weights_is_refused(
    scheme: Scheme, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that takes zeros where the graph has quantised weights, and every other weight as it is."""
    graph = quantise(bundle, tmp_path, scheme)
    path = graph.folder / "weights.safetensors"
    whole = np.fromfile(path, np.uint8)
    kept = whole.copy()
    for name, ref in read_header(path).tensors.items():
        if name.removesuffix(".weight") in graph.schemes:
            kept[ref.offset_bytes : ref.offset_bytes + ref.nbytes] = 0
    kept.tofile(path)
    monkeypatch.setattr(network, "WeightSearch", lambda weights, data: WeightSearch(weights, whole))
    with pytest.raises(AuditError, match=r"lost weights: of \d+ quantised ones .* 0 are there"):
        graph.build()
