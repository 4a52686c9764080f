"""Layers of a graph against torch's: each is found, a sound graph parts nowhere, a planted fault at its own layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from sdopt.backends.probes import probe_backend
from sdopt.bench.case.report import LayerRecord
from sdopt.bench.compare.component_errors import find_first_parting, measure_layers
from sdopt.bundle.manifest import BundleManifest, read_config, read_manifest
from sdopt.fidelity import layer_errors as layers
from sdopt.fidelity.layer_errors import _measure_error, compare_layers, split_runs
from sdopt.graph.layers import list_layer_values
from sdopt.graph.qdq import LayerChoice, insert_qdq
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme
from sdopt.networks.modules import build_network, tensor_names
from sdopt.processes.call import Outcome

_BF16 = OpenVINOSettings(inference_precision=Precision.BF16)
_needs_bf16 = pytest.mark.skipif(
    Precision.BF16 not in probe_backend(_BF16).precisions, reason="this processor has no bf16 arithmetic"
)


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children's entries in this process: importing torch takes longer than what they do."""

    def call(function: Callable[[Any], Any], arguments: dict[str, Any], **_: Any) -> Outcome[Any]:
        return Outcome(function(arguments), 0, 0)

    monkeypatch.setattr(layers, "call", call)


def _run_on(manifest: BundleManifest, backend: BackendSettings, precision: Precision) -> BundleManifest:
    components = {
        name: record.model_copy(update={"backend": backend, "precision": precision})
        for name, record in manifest.components.items()
    }
    return manifest.model_copy(update={"components": components})


def _compare(folder: Path, backend: BackendSettings, precision: Precision, name: str, work: Path) -> list[LayerRecord]:
    manifest = _run_on(read_manifest(folder), backend, precision)
    compared = compare_layers(folder, manifest, ComponentName(name), work)
    assert not list(work.iterdir())
    return [LayerRecord(component=ComponentName(name), **vars(layer)) for layer in compared.layers]


def _scale_weight(folder: Path, component: str, weight: str, factor: float) -> None:
    """Multiply a weight in the graph alone: torch reads the same weight file."""
    path = folder / component / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    model.graph.initializer.append(onnx.helper.make_tensor("planted", onnx.TensorProto.FLOAT, (), [factor]))
    place, cast = next((i, node) for i, node in enumerate(model.graph.node) if node.input[0] == weight)
    name, cast.output[0] = cast.output[0], "before_planted"
    model.graph.node.insert(place + 1, onnx.helper.make_node("Mul", ["before_planted", "planted"], [name]))
    onnx.save_model(model, path)


@pytest.mark.parametrize("name", [ComponentName.TEXT_ENCODER, ComponentName.UNET, ComponentName.VAE_DECODER])
def test_every_layer_with_weights_and_every_attention_is_found(pristine_bundle: Path, name: ComponentName) -> None:
    network = build_network(name, read_config(pristine_bundle, name))
    values = list_layer_values(pristine_bundle / name / "model.onnx")
    with_weights = {weight.rpartition(".")[0] for weight in tensor_names(network)}
    attentions = {
        module_name.removeprefix("network.")
        for module_name, module in network.named_modules()
        if type(module).__name__ in ("Attention", "CLIPAttention")
    }
    assert {value.layer for value in values if not value.before} == with_weights
    assert {value.layer for value in values if value.before} == attentions


def test_quantised_layers_are_found_where_they_were(bundle: Path) -> None:
    path = bundle / "unet" / "model.onnx"
    model = ir.load(path)
    block = "mid_block.attentions.0.transformer_blocks.0"
    names = (f"{block}.ff.net.2", f"{block}.attn1.to_out.0", "mid_block.resnets.0.conv1")
    insert_qdq(model, {name: LayerChoice(Scheme.INT8, smooth=name.endswith("net.2")) for name in names})
    target = path.with_name("quantised.onnx")
    for value in model.graph.initializers.values():
        value.const_value = value.const_value or ir.tensor([0.0], name=value.name)
    target.write_bytes(ir.to_proto(model).SerializeToString())
    before = {value.layer: value.value for value in list_layer_values(path)}
    after = {value.layer: value.value for value in list_layer_values(target)}
    assert list(before) == list(after)
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        (OpenVINOSettings(), Precision.FP32),
        (OnnxRuntimeSettings(), Precision.FP32),
        pytest.param(_BF16, Precision.BF16, marks=_needs_bf16),
    ],
    ids=["openvino-fp32", "onnxruntime-fp32", "openvino-bf16"],
)
def test_a_sound_graph_parts_nowhere(
    pristine_bundle: Path, tmp_path: Path, backend: BackendSettings, precision: Precision, name: str
) -> None:
    found = _compare(pristine_bundle, backend, precision, name, tmp_path)
    assert len(found) == len(list_layer_values(pristine_bundle / name / "model.onnx"))
    assert find_first_parting(found) is None
    # A tolerance that lets a fault of 5 % pass would prove nothing.
    assert max(layer.tolerance for layer in found) < 0.03


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("backend", "precision"),
    [(OpenVINOSettings(), Precision.FP32), pytest.param(_BF16, Precision.BF16, marks=_needs_bf16)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize(
    "layer",
    [
        "down_blocks.1.resnets.0.conv1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
        "up_blocks.2.resnets.1.conv2",
    ],
)
def test_a_weight_that_is_5_per_cent_too_large_is_found_at_its_layer(
    bundle: Path, tmp_path: Path, backend: BackendSettings, precision: Precision, layer: str
) -> None:
    _scale_weight(bundle, "unet", f"{layer}.weight", 1.05)
    work = tmp_path / "work"
    work.mkdir()
    parting = find_first_parting(_compare(bundle, backend, precision, "unet", work))
    assert parting is not None
    assert parting.layer == layer
    assert parting.relative_error == pytest.approx(0.05, abs=0.025)


@pytest.mark.usefixtures("same_process")
def test_a_wrong_scale_of_attention_is_found_at_that_attention(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "unet" / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    # The first attention over the picture itself in the middle block, by the number of its channels.
    node = [node for node in model.graph.node if node.op_type == "Attention"][6]
    for place, attribute in enumerate(node.attribute):
        if attribute.name == "scale":
            del node.attribute[place]
            break
    node.attribute.append(onnx.helper.make_attribute("scale", 0.9))
    onnx.save_model(model, path)
    expected = [value.layer for value in list_layer_values(path) if value.before][6]
    work = tmp_path / "work"
    work.mkdir()
    parting = find_first_parting(_compare(bundle, OpenVINOSettings(), Precision.FP32, "unet", work))
    assert parting is not None
    assert parting.layer == expected


@pytest.mark.usefixtures("same_process")
def test_several_runs_find_what_one_does(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (pristine_bundle, OnnxRuntimeSettings(low_memory=True), Precision.FP32, "text_encoder", tmp_path)
    once = _compare(*arguments)
    monkeypatch.setattr(layers, "_RUN_LIMIT_BYTES", 100_000)
    again = _compare(*arguments)
    assert [layer.layer for layer in again] == [layer.layer for layer in once]
    assert [layer.relative_error for layer in again] == pytest.approx([each.relative_error for each in once], abs=1e-6)


def test_runs_hold_every_layer_once_and_stay_under_the_limit() -> None:
    shapes = {number: (1, size) for number, size in enumerate((10, 20, 500, 30, 40, 10, 60))}
    runs = list(split_runs(shapes, 400))
    assert [number for run in runs for number in run] == list(shapes)
    assert runs == [[0, 1], [2], [3, 4, 5], [6]]


def test_the_whole_in_its_own_processes(pristine_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(pristine_bundle)
    one = {ComponentName.TEXT_ENCODER: manifest.components[ComponentName.TEXT_ENCODER]}
    tables = measure_layers(pristine_bundle, manifest.model_copy(update={"components": one}), tmp_path, 600)
    assert tables.remark == ""
    assert len(tables.layers) == len(list_layer_values(pristine_bundle / "text_encoder" / "model.onnx"))
    assert find_first_parting(tables.layers) is None


def test_a_component_that_cannot_be_compared_is_a_remark(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    one = {ComponentName.TEXT_ENCODER: manifest.components[ComponentName.TEXT_ENCODER]}
    (bundle / "text_encoder" / "model.onnx").write_bytes(b"no graph")
    work = tmp_path / "work"
    work.mkdir()
    tables = measure_layers(bundle, manifest.model_copy(update={"components": one}), work, 600)
    assert not tables.layers
    assert tables.remark.startswith("text_encoder was not compared: ")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor([[3.0, 4.4]]), 0.08),
        (torch.tensor([3.0, float("nan")]), 1e30),
        (torch.tensor([3.0]), 1e30),
        (torch.tensor([3.0, 4.0]), 0.0),
    ],
)
def test_error_of_a_layer(value: torch.Tensor, error: float) -> None:
    assert _measure_error(torch.tensor([3.0, 4.0]), value) == pytest.approx(error, rel=1e-6)
