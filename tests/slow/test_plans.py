"""Real TensorRT-RTX plans of tiny-shapes, built without a GPU: what they are, and everything that may go wrong.

One store serves the module, so that a network is traced once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import Verdict
from sdopt.convert.plans.build import JOB, PlanJob, Rung, build_in_child
from sdopt.convert.plans.wanted import profile_tables
from sdopt.errors import AuditError, BackendError
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from tests.conftest import TINY_SHAPES
from tests.sdopt_process import run_sdopt

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)

SCRIPT = Path(sys.executable).parent / "sdopt"
GENERATIONS = ["sm86", "sm89", "sm120"]
# TensorRT-RTX 1.7 has none for the six layers of the UNet with heads of 8 numbers, and none for the VAE's one head.
ATTENTION_KERNELS = {
    ComponentName.TEXT_ENCODER: 2, ComponentName.UNET: 8, ComponentName.VAE_DECODER: 0, ComponentName.VAE_ENCODER: 0
}  # fmt: skip


def start(cache: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        env={**os.environ, "SDOPT_CACHE": str(cache)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_sdopt(*words, cache=cache)


@pytest.fixture(scope="module")
def cache(rtx_bundle: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the graphs of tiny-shapes in fp16 and its plans."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    shutil.copytree(rtx_bundle[0], folder)
    return folder


@pytest.fixture(scope="module")
def manifest(rtx_bundle: tuple[Path, Path]) -> BundleManifest:
    return read_manifest(rtx_bundle[1])


def test_every_plan_is_audited(manifest: BundleManifest) -> None:
    """For each component and generation: attention native and counted, the precision asked for, the weights there."""
    for name, record in manifest.components.items():
        assert record.precision is Precision.FP16
        assert [plan.generation for plan in record.plans] == GENERATIONS
        for plan in record.plans:
            audit = plan.audit
            assert audit.attention_native == audit.attention_layers == record.audit.attention_layers > 0
            assert audit.fused_kernels == ATTENTION_KERNELS[name] == audit.kernels.get("attention fp16", 0)
            assert audit.attention_fused == (audit.fused_kernels == audit.attention_layers)
            assert audit.other_precision == ()
            assert all(kind.endswith(" fp16") for kind in audit.compute_layers)
            assert sum(audit.compute_layers.values()) > audit.attention_layers
            assert audit.plan_bytes == manifest.files[plan.file].size_bytes > audit.weights_bytes
            assert audit.zero_share < 0.05
            assert audit.weights_found >= audit.weights_sampled / 2 > 2
            assert plan.file == f"{name}/{plan.generation}.tensorrt-rtx-{'.'.join(plan.version.split('.')[:2])}.plan"
            assert plan.build_peak_bytes > audit.plan_bytes
            assert plan.build_peak_device_bytes is None


def test_a_machine_without_a_gpu_claims_nothing_of_the_engines(manifest: BundleManifest, cache: Path) -> None:
    assert manifest.fidelity.verdict is Verdict.NOT_VERIFIED
    done = run(cache, "convert", str(TINY_SHAPES), "--target", "rtx:sm89", "-o", str(cache.parent / "judged"))
    assert done.returncode == 0, done.stderr
    judged = read_manifest(cache.parent / "judged")
    assert judged.fidelity.verdict is Verdict.GRAPHS_PASS
    assert "have not run on a GPU" in judged.fidelity.reason
    assert all(record.parity is not None and record.parity.passed for record in judged.components.values())


def plan_entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "store" / "plan").glob("*/*")}


def graph_entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "store" / "graph").glob("*/*")}


def test_what_was_built_is_not_built_again_and_lies_on_the_disk_once(
    rtx_bundle: tuple[Path, Path], cache: Path, tmp_path: Path
) -> None:
    before = plan_entries(cache)
    done = run(cache, "convert", str(TINY_SHAPES), "--target", "rtx:sm86", "--no-verify", "-o", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stderr
    assert plan_entries(cache) == before
    again = read_manifest(tmp_path / "again")
    for record in again.components.values():
        file = record.plans[0].file
        assert (tmp_path / "again" / file).read_bytes() == (rtx_bundle[1] / file).read_bytes()
        assert (tmp_path / "again" / file).stat().st_nlink == 2


def test_other_weights_of_the_same_architecture_need_new_plans_and_no_new_trace(cache: Path, tmp_path: Path) -> None:
    """Only the UNet's weights differ, so only its plan is built."""
    source = tmp_path / "source"
    shutil.copytree(TINY_SHAPES, source)
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    # A bit of the mantissa: the last byte but one of the last fp16 number.
    data[-2] ^= 1
    path.write_bytes(data)
    graphs, plans = graph_entries(cache), plan_entries(cache)
    done = run(cache, "convert", str(source), "--target", "rtx:sm89", "--no-verify", "-o", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert "building unet" in done.stderr
    assert "building vae" not in done.stderr
    assert graph_entries(cache) == graphs
    assert len(plan_entries(cache) - plans) == 1


def test_two_builds_of_the_same_thing_at_once(cache: Path, tmp_path: Path) -> None:
    """One builds, both get it: two bundles, one set of plans."""
    folders = [tmp_path / "one", tmp_path / "two"]
    words = ["convert", str(TINY_SHAPES), "--target", "rtx:sm75", "--no-verify", "-o"]
    processes = [start(cache, *words, str(folder)) for folder in folders]
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for record in read_manifest(folders[0]).components.values():
        file = record.plans[0].file
        assert (folders[0] / file).stat().st_ino == (folders[1] / file).stat().st_ino
    for name in ComponentName:
        if name in read_manifest(folders[0]).components:
            assert sum(f"building {name} for sm75 " in text for text in said) == 1, said


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_no_half_plan(cache: Path, tmp_path: Path, sent: signal.Signals) -> None:
    target = {signal.SIGINT: "rtx:sm80", signal.SIGKILL: "rtx:sm121"}[sent]
    words = ["convert", str(TINY_SHAPES), "--target", target, "--no-verify", "-o", str(tmp_path / "b")]
    before = plan_entries(cache)
    process = start(cache, *words)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("building unet"))
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sent is signal.SIGINT else -9), line + err
    assert not (tmp_path / "b").exists()
    assert {name for name in plan_entries(cache) - before if not name.startswith(".part-")} == set()
    done = run(cache, *words)
    assert done.returncode == 0, done.stderr
    assert all(record.plans for record in read_manifest(tmp_path / "b").components.values())


def test_too_little_memory_is_said_with_what_it_takes(cache: Path, tmp_path: Path) -> None:
    done = run(
        cache, "convert", str(TINY_SHAPES), "--target", "rtx:sm89", "--batch", "2", "--no-verify",
        "--max-memory", "100MB", "-o", str(tmp_path / "b"),
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "--max-memory 100MB was not enough" in done.stderr
    assert "it takes about 0.4 GB" in done.stderr
    assert not (tmp_path / "b").exists()


def test_enough_memory_for_one_build_is_used_for_one_at_a_time(cache: Path, tmp_path: Path) -> None:
    done = run(
        cache, "convert", str(TINY_SHAPES), "--target", "rtx:sm89", "--batch", "3", "--no-verify",
        "--max-memory", "600MiB", "-o", str(tmp_path / "b"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rungs = {plan.rung for record in read_manifest(tmp_path / "b").components.values() for plan in record.plans}
    assert rungs == {"one at a time"}


@pytest.mark.parametrize(
    ("target", "code", "named"),
    [("rtx:sm90", 2, "it builds for sm75, sm80, sm86, sm89"), ("tensorrt", 5, "tensorrt")],
)
def test_a_target_that_cannot_be_built_is_refused_at_once(
    cache: Path, tmp_path: Path, target: str, code: int, named: str
) -> None:
    done = run(cache, "convert", str(TINY_SHAPES), "--target", target, "-o", str(tmp_path / "b"))
    assert done.returncode == code
    assert named in done.stderr
    assert not list(tmp_path.iterdir())


def make_job(bundle: Path, component: str, output: Path, **changes: Any) -> dict[str, Any]:
    manifest, name = read_manifest(bundle), ComponentName(component)
    values: dict[str, Any] = {
        "kind": "tensorrt-rtx", "component": name, "precision": Precision.FP16,
        "graph": bundle / component / "model.onnx", "weights": bundle / component / "weights.safetensors",
        "output": output, "generation": "sm89", "profiles": profile_tables(manifest, name),
        "attention_layers": manifest.components[name].audit.attention_layers,
        "native": True, "require_fused": False, "rung": Rung("a test"), "memory_limit_bytes": None,
        "timing_cache": None,
    }  # fmt: skip
    dumped: dict[str, Any] = JOB.dump_python(PlanJob(**{**values, **changes}), mode="json")
    return dumped


def edit_graph(bundle: Path, component: str, folder: Path) -> tuple[onnx.ModelProto, Path]:
    """The graph of a component, to be changed and saved beside a copy of its weights."""
    shutil.copy(bundle / component / "weights.safetensors", folder)
    return onnx.load(bundle / component / "model.onnx", load_external_data=False), folder / "model.onnx"


def test_a_plan_that_lost_its_weights_is_refused(pristine_bundle: Path, tmp_path: Path) -> None:
    """Weights kept in fp32 behind `QuantizeLinear` and `Clip`, which is valid ONNX: TensorRT-RTX 1.7 builds it without
    an error, folds the quantisation away, and the plan has zeros where weights were.
    """
    model, path = edit_graph(pristine_bundle, "unet", tmp_path)
    quantise_behind_clip(model, np.memmap(tmp_path / "weights.safetensors", np.uint8, "r"))
    onnx.save(model, path)
    onnx.checker.check_model(path)
    job = make_job(
        pristine_bundle, "unet", tmp_path / "plan", graph=path, weights=tmp_path / "weights.safetensors",
        precision=Precision.FP32,
    )  # fmt: skip
    with pytest.raises(AuditError, match=r"lost weights: of \d+ that were looked for in it, 0 are there"):
        build_in_child(job)


def quantise_behind_clip(model: onnx.ModelProto, data: np.ndarray) -> None:
    """Q -> Clip -> DQ on every weight of a convolution or matrix product, Q -> DQ on the other input."""
    graph, weights = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    limits = [onnx.helper.make_tensor(n, onnx.TensorProto.INT8, [], [v]) for n, v in (("low", -127), ("high", 127))]
    graph.initializer.extend(limits)
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(list(graph.node)):
        weight = find_weight(node, weights, producers) if node.op_type in ("Conv", "MatMul", "Gemm") else None
        if weight is not None:
            nodes += quantise_inputs(graph, node, weight, data, str(number))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def find_weight(
    node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> onnx.TensorProto | None:
    name = node.input[1]
    while name not in weights:
        before = producers.get(name)
        if before is None or before.op_type not in ("Transpose", "Cast"):
            return None
        name = before.input[0]
    return weights[name] if len(weights[name].dims) > 1 else None


def quantise_inputs(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: onnx.TensorProto, data: np.ndarray, suffix: str
) -> list[onnx.NodeProto]:
    place = {entry.key: int(entry.value) for entry in weight.external_data if entry.key != "location"}
    kind = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}[weight.data_type]
    values = data[place["offset"] : place["offset"] + place["length"]].view(kind)
    channels = weight.dims[0]
    scale = float(np.abs(values.astype(np.float32)).max()) / 127

    def add(name: str, code: int, dims: list[int], value: float) -> str:
        tensor = onnx.helper.make_tensor(f"{name}.{suffix}", code, dims, [value] * (dims[0] if dims else 1))
        graph.initializer.append(tensor)
        return str(tensor.name)

    def link(kind: str, inputs: list[str], **attributes: int) -> onnx.NodeProto:
        return onnx.helper.make_node(kind, inputs, [f"{kind}.{inputs[0]}.{suffix}"], **attributes)

    axis = 0 if node.op_type in ("Conv", "Gemm") else 1
    by_channel = [add("ws", 1, [channels], scale), add("wz", onnx.TensorProto.INT8, [channels], 0)]
    quantise = link("QuantizeLinear", [node.input[1], *by_channel], axis=axis)
    clip = link("Clip", [quantise.output[0], "low", "high"])
    restore = link("DequantizeLinear", [clip.output[0], *by_channel], axis=axis)
    whole = [add("xs", 1, [], 0.05), add("xz", onnx.TensorProto.INT8, [], 0)]
    quantise_x = link("QuantizeLinear", [node.input[0], *whole])
    restore_x = link("DequantizeLinear", [quantise_x.output[0], *whole])
    node.input[0], node.input[1] = restore_x.output[0], restore.output[0]
    return [quantise, clip, restore, quantise_x, restore_x]


def test_attention_that_was_written_out_is_refused_and_named(cache: Path, tmp_path: Path) -> None:
    """With `--require-fused` by exit code 3; where the graph was meant to be native, always."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('target = "rtx:sm89"\ndialect = "opset18"\n', encoding="utf-8")
    words = ["convert", str(TINY_SHAPES), "--recipe", str(recipe), "--no-verify", "-o", str(tmp_path / "b")]
    done = run(cache, *words, "--require-fused", "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "AuditError"
    assert "attention layers in torch and 0 in its network; written out: node_" in done.stderr
    assert not (tmp_path / "b").exists()
    done = run(cache, *words)
    assert done.returncode == 0, done.stderr
    written_out = read_manifest(tmp_path / "b")
    for name, record in written_out.components.items():
        (audit,) = (plan.audit for plan in record.plans)
        assert audit.attention_native == 0 < audit.attention_layers
        # The builder finds by itself what it has kernels for.
        assert audit.fused_kernels == ATTENTION_KERNELS[name]
    with pytest.raises(AuditError, match="written out"):
        build_in_child(make_job(tmp_path / "b", "vae_decoder", tmp_path / "plan"))


def test_a_layer_in_another_precision_is_refused_and_named(rtx_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    job = make_job(rtx_bundle[1], "vae_decoder", tmp_path / "plan", precision=Precision.BF16)
    with pytest.raises(AuditError, match=r"to compute in bf16, and \d+ layers do not: node_\w+ \(fp16\)"):
        build_in_child(job)


def test_a_node_that_the_parser_refuses_is_named(rtx_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = edit_graph(rtx_bundle[1], "vae_decoder", tmp_path)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.op_type, node.domain = "Whirl", "made.up"
    model.opset_import.append(onnx.helper.make_opsetid("made.up", 1))
    onnx.save(model, path)
    job = make_job(
        rtx_bundle[1], "vae_decoder", tmp_path / "plan", graph=path, weights=tmp_path / "weights.safetensors"
    )
    with pytest.raises(BackendError, match=rf"the node '{node.name}' \(Whirl\) of vae_decoder") as caught:
        build_in_child(job)
    assert caught.value.hint


def test_several_sizes_and_prompt_lengths(cache: Path, tmp_path: Path) -> None:
    """A plan for each size where the size matters, and an optimisation profile in it for each prompt length."""
    done = run(
        cache, "convert", str(TINY_SHAPES), "--target", "rtx:sm89", "--size", "64x64,64x96", "--tokens", "154",
        "--no-verify", "-o", str(tmp_path / "b"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    components = read_manifest(tmp_path / "b").components
    unet, text = components[ComponentName.UNET].plans, components[ComponentName.TEXT_ENCODER].plans
    assert [(plan.profile, Path(plan.file).name.split(".")[0]) for plan in unet] == [
        (0, "sm89-64x64"),
        (1, "sm89-64x96"),
    ]
    assert {plan.prompt_chunks for plan in unet} == {(1, 2)}
    assert {plan.audit.fused_kernels for plan in unet} == {ATTENTION_KERNELS[ComponentName.UNET]}
    assert all(plan.audit.attention_fused for plan in text)
    assert [(plan.profile, plan.prompt_chunks) for plan in text] == [(0, (1,)), (1, (1,))]
    assert len({plan.file for plan in text}) == 1


def test_attention_that_the_builder_quietly_wrote_out_is_refused(rtx_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 may not decompose it and does not fail; the plan's own text says which kernels are there."""
    with pytest.raises(AuditError, match="attention in unet is not fused: 8 of 14 layers have a dedicated kernel"):
        build_in_child(make_job(rtx_bundle[1], "unet", tmp_path / "plan", require_fused=True))
    build_in_child(make_job(rtx_bundle[1], "text_encoder", tmp_path / "plan", require_fused=True))


def test_a_range_has_fused_attention_or_says_that_it_has_not(cache: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 has no dedicated kernel for heads of 8 numbers, which tiny-shapes has, at unknown sizes."""
    words = ["convert", str(TINY_SHAPES), "--target", "rtx:sm89", "--size", "64x64..96x96", "--no-verify", "-o"]
    done = run(cache, *words, str(tmp_path / "fused"), "--require-fused")
    assert done.returncode == 3, done.stderr
    assert "attention in unet cannot be fused" in done.stderr
    done = run(cache, *words, str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    components = read_manifest(tmp_path / "b").components
    (unet,) = components[ComponentName.UNET].plans
    assert unet.audit.fused_kernels == ATTENTION_KERNELS[ComponentName.UNET]
    assert not unet.audit.attention_fused
    assert unet.audit.attention_native == unet.audit.attention_layers


def test_a_plan_that_no_bundle_holds_leaves_the_store_after_a_day(cache: Path, tmp_path: Path) -> None:
    words = ["convert", str(TINY_SHAPES), "--target", "rtx:sm89", "--no-verify", "-o"]
    assert run(cache, *words, str(tmp_path / "held")).returncode == 0
    held = {path.stat().st_ino for path in (tmp_path / "held").rglob("*.plan")}
    yesterday = time.time() - 25 * 3600
    for entry in (cache / "store" / "plan").glob("*/*"):
        os.utime(entry, (yesterday, yesterday))
    assert run(cache, *words, str(tmp_path / "more")).returncode == 0
    left = {path.stat().st_ino for path in (cache / "store" / "plan").rglob("engine.plan")}
    assert held <= left
    assert all(path.stat().st_nlink > 1 for path in (cache / "store" / "plan").rglob("engine.plan"))
