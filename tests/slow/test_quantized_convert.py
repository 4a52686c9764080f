"""`sdopt convert --precision int8` on tiny-shapes, with faults planted in a block, and what is made of the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdopt
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import BlockRecord, Verdict
from sdopt.convert.blocks import trials
from sdopt.convert.blocks import write as variants
from sdopt.convert.convert import convert
from sdopt.convert.decide import open_plan
from sdopt.errors import ArtifactError, FidelityError
from sdopt.fidelity.candidate import open_candidate
from sdopt.graph.qdq import LayerChoice
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType
from sdopt.model.recipe import parse_recipe
from sdopt.pipeline.load import close_engines
from sdopt.processes.call import Outcome
from sdopt.processes.channel import JsonTable
from sdopt.weights.safetensors_header import read_header
from tests.conftest import TINY_ADAPTERS, TINY_SHAPES
from tests.sdopt_process import run_sdopt
from tests.shapes_check import load_check
from tests.slotted_bundle import add_slots_to

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
BROKEN = "up_blocks.2 transformer"
SLOWED = "up_blocks.1 transformer"


def write_settings(folder: Path, **changes: Any) -> Path:
    """The shipped int8.toml with a short calibration, and other changes at its top."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in changes.items()]
    text = (ROOT / "configs" / "quantization" / "int8.toml").read_text(encoding="utf-8")
    text = text.replace("trajectories = 4", "trajectories = 2").replace("held_out = 2", "held_out = 1")
    kept = [line for line in text.splitlines() if line.partition(" ")[0] not in changes]
    path = folder / "int8.toml"
    path.write_text("\n".join([*lines, *kept]) + "\n", encoding="utf-8")
    return path


def build(folder: Path, source: Path, settings: Path, **recipe: Any) -> BundleManifest:
    values = {"source": str(source), "precision": "int8", "quantization": str(settings), "target": "openvino", **recipe}
    return convert(open_plan(parse_recipe(values, where="the test")), folder)


def blocks_of(manifest: BundleManifest, name: ComponentName = ComponentName.UNET) -> dict[str, BlockRecord]:
    record = manifest.components[name].quantization
    assert record is not None
    return {block.name: block for block in record.blocks}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-shapes with every block in INT8 that the error allows, whatever its speed."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDOPT_CACHE", str(folder / "cache"))  # which the tests below share
        build(folder / "bundle", TINY_SHAPES, write_settings(folder, judge_speed=False))
    return folder / "bundle"


def test_a_bundle_in_int8_is_half_as_large_and_draws_the_picture(whole: Path) -> None:
    manifest = read_manifest(whole)
    assert manifest.fidelity.verdict is Verdict.PASS
    unet = manifest.components[ComponentName.UNET].quantization
    assert unet is not None
    assert all(block.quantized for block in unet.blocks)
    assert unet.integer_layers is not None
    assert unet.integer_layers >= unet.quantized_layers  # the kernels that OpenVINO runs
    weights = read_header(whole / "unet" / "weights.safetensors").tensors
    quantized = [ref for ref in weights.values() if ref.dtype is DType.INT8]
    assert len(quantized) == unet.quantized_layers
    before = sum(2 * ref.nbytes for ref in quantized)
    scales = sum(ref.nbytes for key, ref in weights.items() if key.endswith("_scale"))
    assert sum(ref.nbytes for ref in quantized) + scales <= 0.55 * before
    counts = [node.op_type for node in onnx.load(whole / "unet" / "model.onnx", load_external_data=False).graph.node]
    assert counts.count("Attention") == manifest.components[ComponentName.UNET].audit.attention_layers
    assert "Clip" not in counts


def test_torch_draws_from_the_checkpoint_not_from_the_rounded_weights(whole: Path, tmp_path: Path) -> None:
    manifest = read_manifest(whole)
    name = "down_blocks.0.attentions.0.proj_in.weight"
    (source,) = (TINY_SHAPES / "unet").glob("*.safetensors")
    with open_candidate(whole, manifest, TorchSettings()) as pipeline:
        network = pipeline.unet.session.engine.network
        assert torch.equal(network.get_parameter(name), load_file(source)[name].float())
    moved = manifest.model_copy(
        update={"recipe": manifest.recipe.model_copy(update={"source": str(tmp_path / "gone")})}
    )
    with (
        pytest.raises(ArtifactError, match="torch needs the checkpoint"),
        open_candidate(whole, moved, TorchSettings()),
    ):
        pass


def test_pictures_in_int8_show_what_the_prompts_ask_for(whole: Path) -> None:
    """Colour, shape, size and place, over a seeded sample; benchmarks/README.md has the figures of 500."""
    check = load_check()
    scenes = check.sample_scenes(40, 5)
    prompts = [check.write_prompt(scene) for scene in scenes]
    shares = {}
    for folder, batch in ((TINY_SHAPES, 20), (whole, 1)):
        images = check.draw_with_model(folder, prompts, 5, batch)
        shares[folder] = check.count_right(
            [check.judge_image(image, scene) for image, scene in zip(images, scenes, strict=True)]
        )
    for attribute, share in shares[TINY_SHAPES].items():
        assert shares[whole][attribute] >= share - 1 / len(scenes), attribute


def test_trained_loras_act_in_int8(whole: Path, tmp_path: Path) -> None:
    """The line instead of the area, and white on blue: as much as in fp32, which the unit tests look at."""
    check = load_check()
    scene = check.Scene("square", "green", "black", "large", "right")
    shown = {"": scene, "<lora:palette:1>": replace(scene, colour="white", ground="blue")}
    pipe = sdopt.load(add_slots_to(whole, tmp_path / "slotted"))
    for palette, expected in shown.items():
        filling = []
        for weight in (0, 0.5, 1):
            prompt = f"{check.write_prompt(scene)}<lora:outlines:{weight}>{palette}"
            request = {"prompt": prompt, "steps": 10, "seed": 3, "guidance_scale": 4.0}
            pixels = np.array(sdopt.draw(pipe, request, lora_folders=[TINY_ADAPTERS]))
            filling.append(check.measure_filling(pixels, expected))
            if palette:
                assert check.measure_palette_distance(pixels, ("white", "blue")) < 40
        assert filling[0] > 0.9
        assert filling[0] >= filling[1] >= filling[2]
        assert filling[2] < 0.2
    close_engines(pipe)


def plant_outliers(target: Path) -> None:
    """Make one channel of a block's normalised inputs 500 times as large, and the weights behind it as much smaller.

    The network stays the same; with one scale for all channels, INT8 has no levels left for the others.
    """
    shutil.copytree(TINY_SHAPES, target)
    (file,) = (target / "unet").glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    block = BROKEN.split()[0]
    users = {"norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm2": ("attn2.to_q",), "norm3": ("ff.net.0.proj",)}
    for name in [name for name in tensors if name.startswith(f"{block}.attentions") and name.endswith("norm3.weight")]:
        base = name.removesuffix("norm3.weight")
        for norm, layers in users.items():
            for part in ("weight", "bias"):
                tensors[f"{base}{norm}.{part}"][3] *= 500
            for layer in layers:
                tensors[f"{base}{layer}.weight"][:, 3] /= 500
    save_file(tensors, file)


def slow_trials(patch: pytest.MonkeyPatch) -> None:
    """Trials run in this process, and those with the slowed block have work in their graph that changes nothing."""

    def run_here(function: object, arguments: JsonTable) -> Outcome[JsonTable]:
        assert function is trials.measure_in_child
        return Outcome(trials.measure_in_child(arguments), 0, 0)

    def write_slow(stock: variants.Stock, layers: Mapping[str, LayerChoice], name: str) -> None:
        variants.write_trial(stock, layers, name)
        if any(layer.startswith(f"{SLOWED.split()[0]}.attentions") for layer in layers):
            add_work(stock.folder / name)

    patch.setattr(trials, "call", run_here)
    patch.setattr(trials, "write_trial", write_slow)


def add_work(path: Path) -> None:
    """Products of large matrices that depend on the input, of which 0 times the sum is added to the output."""
    model = ir.load(path)
    graph = model.graph
    output = graph.outputs[0]
    producer = output.producer()
    assert producer is not None
    one = ir.tensor([1024, 1024], dtype=ir.DataType.INT64, name="work_shape")
    shape = ir.Value(name="work_shape", const_value=one, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    zero = ir.Value(
        name="work_zero", const_value=ir.tensor(0.0, dtype=ir.DataType.FLOAT, name="work_zero"), shape=ir.Shape(()),
        type=ir.TensorType(ir.DataType.FLOAT),
    )  # fmt: skip
    for value in (shape, zero):
        graph.initializers[str(value.name)] = value
    nodes = [ir.node("ReduceMean", [graph.inputs[0]], {"keepdims": 0})]
    nodes.append(ir.node("Expand", [nodes[-1].outputs[0], shape]))
    for _ in range(12):
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], nodes[1].outputs[0]]))
        nodes.append(ir.node("Sin", [nodes[-1].outputs[0]]))
    nodes.append(ir.node("ReduceMean", [nodes[-1].outputs[0]], {"keepdims": 0}))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], zero]))
    renamed = ir.node("Add", [output, nodes[-1].outputs[0]])
    renamed.outputs[0].name, renamed.outputs[0].dtype, renamed.outputs[0].shape = "work_sum", output.dtype, output.shape
    for node in (*nodes, renamed):
        graph.append(node)
    name, output.name = output.name, "work_before"
    renamed.outputs[0].name = name
    graph.outputs[0] = renamed.outputs[0]
    path.write_bytes(ir.to_proto(model).SerializeToString())


def test_a_block_that_int8_breaks_and_one_that_it_slows_down_stay_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    plant_outliers(tmp_path / "planted")
    slow_trials(monkeypatch)
    settings = write_settings(tmp_path, held_out_error=0.03)
    blocks = blocks_of(build(tmp_path / "bundle", tmp_path / "planted", settings))
    assert not blocks[BROKEN].quantized
    assert "error" in blocks[BROKEN].reason
    assert blocks[BROKEN].error > 0.03
    assert not blocks[SLOWED].quantized
    assert blocks[SLOWED].reason.startswith("slower")
    assert blocks[SLOWED].speedup is not None
    assert blocks[SLOWED].speedup.high < 1
    sound = [block for name, block in blocks.items() if name not in (BROKEN, SLOWED)]
    assert all(block.error < 0.03 for block in sound)


def test_nothing_that_pays_is_the_16_bit_bundle_and_exit_3_where_it_was_required(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(whole.parent / "cache"))
    settings = write_settings(tmp_path, judge_speed=False, held_out_error=1e-6)
    manifest = build(tmp_path / "bundle", TINY_SHAPES, settings, verify={"fidelity": False})
    assert not any(record.is_quantized for record in manifest.components.values())
    record = manifest.components[ComponentName.UNET].quantization
    assert record is not None
    assert "no block of" in record.describe()
    assert all(
        ref.dtype is not DType.INT8
        for ref in read_header(tmp_path / "bundle/unet/weights.safetensors").tensors.values()
    )
    with pytest.raises(FidelityError, match="no block pays") as stopped:
        build(tmp_path / "other", TINY_SHAPES, settings, verify={"fidelity": False}, require_quantized=True)
    assert stopped.value.exit_code == 3
    assert not (tmp_path / "other").exists()


def test_pictures_that_leave_the_budget_take_blocks_back(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(whole.parent / "cache"))
    settings = write_settings(tmp_path, judge_speed=False)
    manifest = build(tmp_path / "bundle", TINY_SHAPES, settings, verify={"max_psnr_loss": 4.0})
    unet = manifest.components[ComponentName.UNET].quantization
    assert unet is not None
    left = [block for block in unet.blocks if not block.quantized]
    assert left
    assert all("pictures" in block.reason and "dB" in block.reason for block in left)
    assert manifest.fidelity.verdict is Verdict.PASS


def test_a_second_run_measures_nothing_and_says_what_was_kept(whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    settings = write_settings(tmp_path, judge_speed=False)
    recipe.write_text(f'precision = "int8"\nquantization = "{settings}"\ntarget = "openvino"\n', encoding="utf-8")

    def run(*words: str) -> str:
        done = run_sdopt(*words, cache=whole.parent / "cache")
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = run("convert", str(TINY_SHAPES), "--recipe", str(recipe), "-o", str(tmp_path / "bundle"))
    assert "blocks (" in said
    for word in ("recording", "calibrating", "trying", "tracing"):
        assert word not in said
    shown = run("inspect", str(tmp_path / "bundle"))
    assert BROKEN.split()[0] in shown
    assert "int8-weights" in shown
