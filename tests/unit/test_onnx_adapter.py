"""A LoRA for plain ONNX Runtime: the exported graph with its adapter computes what the engine with slots computes."""

from __future__ import annotations

import json
import pathlib
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from sdopt.backends.component_files import component_files
from sdopt.backends.open import open_session
from sdopt.backends.slotted_session import SlottedSession
from sdopt.bundle.manifest import read_manifest
from sdopt.cli.adapter import adapter as command
from sdopt.errors import AdapterError, UsageError
from sdopt.export.onnx_adapter import export_onnx_adapter
from sdopt.model.backend_settings import OnnxRuntimeSettings
from sdopt.model.component import ComponentName
from sdopt.pipeline.lora_scales import LayerScales
from sdopt.pipeline.lora_stack import LoraStack
from sdopt.trace.seeded_inputs import make_inputs
from tests.slotted_bundle import add_slots_to, write_lora

WEIGHT = 0.7
NAMES = (ComponentName.TEXT_ENCODER, ComponentName.UNET)


@pytest.fixture(scope="module")
def slotted(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_slots_to(pristine_bundle, tmp_path_factory.mktemp("slots") / "bundle")


@pytest.fixture(scope="module")
def lora(slotted: Path) -> Path:
    # With convolutions: their slots have other shapes.
    endings = ("to_q", "ff.net.2", "q_proj", "conv1", "conv_in", "proj_in")
    return write_lora(slotted.parent / "ink.safetensors", slotted, 3, endings=endings)


@pytest.mark.parametrize("name", NAMES)
def test_plain_onnxruntime_computes_the_same(name: ComponentName, slotted: Path, lora: Path, tmp_path: Path) -> None:
    done = export_onnx_adapter(lora, slotted, tmp_path / "ink", weight=WEIGHT, error_limit=0.02)
    manifest = read_manifest(slotted)
    files = component_files(slotted, manifest, name)
    inputs = make_inputs(files.spec, files.config, files.extents)
    session = open_session(files, OnnxRuntimeSettings())
    assert isinstance(session, SlottedSession)
    with session:
        plain = session.run(inputs)
        sessions = {each: session if each is name else open_slotted(slotted, each) for each in NAMES}
        stack = LoraStack(slotted, manifest, sessions)
        stack.load(lora, "ink", error_limit=0.02)
        stack.activate({"ink": {each: LayerScales(WEIGHT) for each in NAMES}})
        expected = session.run(inputs)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(done.weights[name]))
    graph = onnxruntime.InferenceSession((done.folder / done.graphs[name]).read_bytes(), options)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(done.folder / done.adapters[name]))
    run = onnxruntime.RunOptions()
    run.add_active_adapter(adapter)
    feeds = {key: value.numpy() for key, value in inputs.items()}
    outputs = [each.name for each in files.spec.outputs]
    assert any((expected[key] - plain[key]).norm() > 0.01 * plain[key].norm() for key in outputs)
    for key, without, value in zip(outputs, graph.run(outputs, feeds), graph.run(outputs, feeds, run), strict=True):
        torch.testing.assert_close(torch.from_numpy(without), plain[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(value), expected[key], rtol=1e-5, atol=1e-5)


def open_slotted(folder: Path, name: ComponentName) -> SlottedSession:
    session = open_session(component_files(folder, read_manifest(folder), name), OnnxRuntimeSettings())
    assert isinstance(session, SlottedSession)
    return session


def test_a_bundle_without_slots_says_how_to_get_them(pristine_bundle: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no LoRA slots") as caught:
        export_onnx_adapter(lora, pristine_bundle, tmp_path / "ink", weight=1.0, error_limit=0.02)
    assert "--lora-slots" in caught.value.hint
    assert not (tmp_path / "ink").exists()


def test_a_file_that_does_not_fit_writes_nothing(slotted: Path, pristine_bundle: Path, tmp_path: Path) -> None:
    large = write_lora(tmp_path / "large.safetensors", pristine_bundle, 0, rank=48)
    with pytest.raises(AdapterError, match="rank"):
        export_onnx_adapter(large, slotted, tmp_path / "ink", weight=1.0, error_limit=0.0)
    assert not (tmp_path / "ink").exists()


def test_the_command_shows_how_it_is_loaded(slotted: Path, lora: Path, tmp_path: Path) -> None:
    words = ["export", str(lora), "--for", str(slotted), "-o", str(tmp_path / "ink"), "--json"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    table = json.loads(done.stdout)
    assert set(table["networks"]) == set(NAMES)
    for network in table["networks"].values():
        assert (tmp_path / "ink" / network["adapter"]).is_file()
        assert network["adapter"] in done.stderr
    # What it says is Python that works.
    code = "\n".join(line.strip() for line in done.stderr.splitlines() if line.startswith("  "))
    exec(
        code.replace("session.run(None, inputs, run)", "assert session.get_inputs()"),
        {"onnxruntime": onnxruntime, "pathlib": pathlib},
    )
