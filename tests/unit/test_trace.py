"""Tracing without weights: the graph is the network, whatever checkpoint's weight file lies beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file

import sdopt.trace.trace
from sdopt.backends.onnxruntime import OnnxRuntimeBackend
from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.records import ParityRecord
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert import graphs
from sdopt.convert.graphs import TraceJob
from sdopt.errors import ArtifactError, ExportError, ShapeError
from sdopt.graph.external_data import check_graph_file
from sdopt.model.backend_settings import OnnxRuntimeSettings
from sdopt.model.component import ComponentName, describe_component, vae_factor
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.recipe import Dialect
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.networks.modules import build_network, count_attention_layers
from sdopt.trace.bind import bind_weights
from sdopt.trace.compare_outputs import compare_outputs
from sdopt.trace.reference import load_reference, run_reference
from sdopt.trace.seeded_inputs import make_inputs
from sdopt.trace.trace import trace_component
from sdopt.weights.safetensors_header import TensorRef, read_header
from sdopt.weights.stream import storage_layout, write_weights

# The networks are too small to share out, and tests run beside each other.
torch.set_num_threads(1)

STATIC = ShapeProfile.static(height_px=32, width_px=64)
DYNAMIC = ShapeProfile(Extent(1, 1, 3), Extent(32, 32, 128), Extent(32, 64, 128))


@cache
def trace(job_key: str, source: Path, name: ComponentName, dtype: DType, dialect: Dialect, dynamic: bool) -> bytes:
    del job_key
    return graphs._trace(describe_job(source, name, dtype, dialect, dynamic=dynamic))[0]


def describe_job(source: Path, name: ComponentName, dtype: DType, dialect: Dialect, *, dynamic: bool) -> TraceJob:
    checkpoint = open_checkpoint(str(source))
    part = checkpoint.components[name]
    spec = describe_component(name, part.config, checkpoint.family, dtype)
    factor = vae_factor(checkpoint.components[ComponentName.VAE_DECODER].config)
    extents = (DYNAMIC if dynamic else STATIC).axis_extents(factor)
    layout = storage_layout(part.tensors, dtype)
    return TraceJob("", spec, dict(part.config), extents, layout, dtype, dialect, dynamic)


@dataclasses.dataclass
class Built:
    """One component on disk, as a bundle has it, and the tensors that it came from."""

    files: ComponentFiles
    tensors: Mapping[str, TensorRef]
    dtype: DType

    def prove(self, extents: Mapping[str, Extent] | None = None) -> ParityRecord:
        spec, config = self.files.spec, self.files.config
        inputs = make_inputs(spec, config, extents or self.files.extents)
        expected = self.files.folder / "expected.safetensors"
        run_reference(load_reference(spec, config, self.tensors), spec, inputs, expected)
        with OnnxRuntimeBackend(OnnxRuntimeSettings()).open(self.files) as session:
            outputs = session.run(inputs)
        return compare_outputs(spec, load_file(expected), outputs, runtime="onnxruntime", graph_dtype=self.dtype)


def build(
    folder: Path, source: Path, name: ComponentName, dtype: DType = DType.FP32,
    dialect: Dialect = Dialect.NATIVE_ATTENTION, *, dynamic: bool = False, key: str = "",
) -> Built:  # fmt: skip
    checkpoint = open_checkpoint(str(source))
    job = describe_job(source, name, dtype, dialect, dynamic=dynamic)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(trace(key, source, name, dtype, dialect, dynamic))
    tensors = checkpoint.components[name].tensors
    write_weights(folder / "weights.safetensors", tensors, dtype, label="")
    files = ComponentFiles(folder, job.spec, job.config, checkpoint.family, job.extents)
    return Built(files, tensors, dtype)


def count_nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in check_graph_file(path).graph.node)


def layers_of_torch(built: Built) -> int:
    with torch.device("meta"):
        return count_attention_layers(build_network(built.files.name, built.files.config))


TEXT, UNET, DECODER = ComponentName.TEXT_ENCODER, ComponentName.UNET, ComponentName.VAE_DECODER
CASES = [
    (Family.SD1, UNET, DType.FP32), (Family.SDXL, UNET, DType.FP16),
    (Family.SDXL, ComponentName.TEXT_ENCODER_2, DType.FP16), (Family.SD1, DECODER, DType.FP16),
    (Family.SD1, ComponentName.VAE_ENCODER, DType.FP32),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "dtype"), CASES)
def test_a_graph_with_native_attention_is_the_network(
    family: Family, name: ComponentName, dtype: DType, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    built = build(tmp_path / "c", checkpoints[family], name, dtype)
    counts = count_nodes(built.files.graph)
    assert counts["Attention"] == layers_of_torch(built) > 0
    assert counts["Softmax"] == 0
    assert built.files.graph.stat().st_size < 1_000_000, "the graph holds weights"
    record = built.prove()
    assert record.passed, record


@pytest.mark.parametrize("name", [UNET, TEXT])
def test_the_older_dialect_is_the_same_network_without_native_attention(
    name: ComponentName, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], name, dialect=Dialect.DECOMPOSED)
    counts = count_nodes(built.files.graph)
    assert counts["Attention"] == 0
    assert counts["Softmax"] == layers_of_torch(built)
    assert check_graph_file(built.files.graph).opset_import[0].version == 18
    onnx.checker.check_model(built.files.graph)
    record = built.prove()
    assert record.passed, record


# The UNet's takes half a minute: tests/slow/test_dynamic.py
@pytest.mark.parametrize("name", [TEXT, DECODER])
def test_one_dynamic_graph_runs_every_size_and_batch(
    name: ComponentName, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], name, dynamic=True)
    names = {dim.dim_param for value in check_graph_file(built.files.graph).graph.input
             for dim in value.type.tensor_type.shape.dim if dim.dim_param}  # fmt: skip
    axes = {axis for spec in built.files.spec.inputs for axis in spec.axes if isinstance(axis, str)}
    assert names == {axis for axis in axes if not built.files.extents[axis].is_static}
    assert count_nodes(built.files.graph)["Attention"] == layers_of_torch(built)
    for batch, height, width in ((1, 32, 64), (2, 96, 32), (3, 128, 128)):
        extents = ShapeProfile.static(height_px=height, width_px=width, batch=batch).axis_extents(2)
        record = built.prove(extents)
        assert record.passed, (batch, height, width, record)
    with pytest.raises(ShapeError):
        built.prove(ShapeProfile.static(height_px=128, width_px=128, batch=4).axis_extents(2))


def test_a_dynamic_axis_that_torch_fixes_is_no_dynamic_graph(
    checkpoints: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(torch.nn.Module):
        network = torch.nn.Identity()

        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            return latent_sample * 2 if latent_sample.shape[2] == 16 else latent_sample

    job = describe_job(checkpoints[Family.SD1], DECODER, DType.FP32, Dialect.NATIVE_ATTENTION, dynamic=True)
    monkeypatch.setattr(sdopt.trace.trace, "build_network", lambda *_: Fixed())
    with pytest.raises(ExportError, match=r"static shape of 16"):
        trace_component(
            job.spec, job.config, job.extents, dtype=DType.FP32, dialect=Dialect.NATIVE_ATTENTION, dynamic=True
        )


def test_the_weights_of_another_checkpoint_fit_the_graph(checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    ours = build(tmp_path / "c", checkpoints[Family.SD1], UNET)
    generator = torch.Generator().manual_seed(1)
    others = {
        # Random in another way than the first, and in fp16 again: the layout is that of the architecture.
        name: (torch.randn(ref.shape, generator=generator) * 0.05).half()
        for name, ref in ours.tensors.items()
    }
    save_file(others, tmp_path / "other.safetensors")
    tensors = read_header(tmp_path / "other.safetensors").tensors
    before = ours.files.weights.read_bytes()
    write_weights(ours.files.weights, tensors, DType.FP32, label="")
    assert ours.files.weights.stat().st_size == len(before)
    assert ours.files.weights.read_bytes() != before
    check_graph_file(ours.files.graph)
    record = Built(ours.files, tensors, DType.FP32).prove()
    assert record.passed, record
    assert not ours.prove().passed, "parity cannot tell one checkpoint from another"


def change_file(built: Built, change: Any) -> None:
    header = read_header(built.files.weights).tensors
    data = bytearray(built.files.weights.read_bytes())
    change(header, data)
    built.files.weights.write_bytes(data)


def swap_two(header: Mapping[str, TensorRef], data: bytearray) -> None:
    """Two attention projections of one shape: each is sane, and the picture is another."""
    a, b = (header[f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{part}.weight"] for part in ("to_q", "to_v"))
    assert a.shape == b.shape
    first, second = (slice(ref.offset_bytes, ref.offset_bytes + ref.nbytes) for ref in (a, b))
    data[first], data[second] = data[second], data[first]


def zero_one(header: Mapping[str, TensorRef], data: bytearray) -> None:
    ref = header["conv_out.bias"]
    data[ref.offset_bytes : ref.offset_bytes + ref.nbytes] = bytes(ref.nbytes)


def plant_nan(header: Mapping[str, TensorRef], data: bytearray) -> None:
    ref = header["conv_in.weight"]
    data[ref.offset_bytes : ref.offset_bytes + 2] = b"\x00\x7e"


@pytest.mark.parametrize("fault", [swap_two, zero_one, plant_nan])
def test_parity_fails_on_a_planted_fault(fault: Any, checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    built = build(tmp_path / "c", checkpoints[Family.SD1], UNET)
    assert built.prove().passed
    change_file(built, fault)
    assert not built.prove().passed


def test_attention_in_pieces_is_refused_in_the_native_dialect(
    checkpoints: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = describe_job(checkpoints[Family.SD1], UNET, DType.FP32, Dialect.NATIVE_ATTENTION, dynamic=False)
    build_real = build_network

    def build_in_pieces(*arguments: Any) -> torch.nn.Module:
        network = build_real(*arguments)
        network.network.set_attn_processor(AttnProcessor())  # type: ignore[operator, union-attr]
        return network

    monkeypatch.setattr(sdopt.trace.trace, "build_network", build_in_pieces)
    with pytest.raises(ArtifactError, match="attention layers"):
        graphs._trace(job)


def test_a_graph_is_the_same_every_time(checkpoints: dict[Family, Path], tmp_path: Path) -> None:
    graphs_of_two = [
        trace(key, checkpoints[Family.SD1], TEXT, DType.FP32, Dialect.NATIVE_ATTENTION, False) for key in ("1", "2")
    ]
    assert graphs_of_two[0] == graphs_of_two[1]


def test_a_weight_that_the_file_has_not_is_named(checkpoints: dict[Family, Path]) -> None:
    job = describe_job(checkpoints[Family.SD1], TEXT, DType.FP32, Dialect.NATIVE_ATTENTION, dynamic=False)
    traced = trace_component(job.spec, job.config, job.extents, dtype=DType.FP32, dialect=job.dialect, dynamic=False)
    layout = dict(job.layout)
    name = next(name for name in layout if name.endswith("q_proj.weight"))
    layout[name] = (layout[name][0], (1, 1))
    with pytest.raises(ExportError, match=name):
        bind_weights(traced.model, layout, DType.FP32)
