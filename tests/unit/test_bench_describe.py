"""Which files count as a candidate's own, and what its audit says in a line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.bench import describe as describe_module
from sdopt.bench.case.candidates import Candidate
from sdopt.bench.case.report import CandidateKind
from sdopt.bench.describe import describe_audits, find_build_time, find_size
from sdopt.bundle.records import BuildRecord, GraphAudit, OutputParity, ParityRecord
from sdopt.disk.digest import FileRecord
from sdopt.errors import MissingHardware
from sdopt.model.backend_settings import TensorRTSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision

SIZES = {
    "text_encoder/model.onnx": 1,
    "text_encoder/weights.safetensors": 10,
    "text_encoder/SM86.plan": 100,
    "text_encoder/SM89.plan": 1_000,
    "unet/model.onnx": 10_000,
    "unet/weights.safetensors": 100_000,
    "scheduler/scheduler_config.json": 1_000_000,
}


def make_plan(file: str) -> Any:
    audit = SimpleNamespace(
        attention_layers=4, attention_native=4, attention_fused=True, fused_kernels=None, other_precision=("a",),
        weights_found=9, weights_sampled=10,
    )  # fmt: skip
    return SimpleNamespace(file=file, flavour="tensorrt-rtx", version="1.5", generation="sm89", audit=audit)


def make_component(**values: Any) -> Any:
    graph = GraphAudit(opset=22, nodes=90, attention_nodes=4, attention_layers=4)
    usual = {
        "plans": (), "quantization": None, "audit": graph, "parity": None, "precision": Precision.FP16,
        "backend": TensorRTSettings(kind="tensorrt-rtx"),
    }  # fmt: skip
    return SimpleNamespace(**{"every_plan": (usual | values)["plans"], **usual, **values})


def make_candidate(kind: CandidateKind, *, build: BuildRecord | None = None, **unet: Any) -> Candidate:
    plans = tuple(make_plan(f"text_encoder/SM{n}.plan") for n in (86, 89))
    components = {ComponentName.TEXT_ENCODER: make_component(plans=plans), ComponentName.UNET: make_component(**unet)}
    files = {path: FileRecord(sha256="ab" * 32, size_bytes=size) for path, size in SIZES.items()}
    manifest: Any = SimpleNamespace(components=components, files=files, build=build)
    settings = TorchSettings() if kind is CandidateKind.TORCH else None
    return Candidate("c", "a candidate", Precision.FP16, settings, Path("bundle"), manifest, kind)


@pytest.fixture
def second_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine runs the second plan of each component."""

    def choose(folder: Path, manifest: Any, machine: Any) -> dict[ComponentName, Any]:
        return {name: record.plans[1:] for name, record in manifest.components.items() if record.plans}

    monkeypatch.setattr(describe_module, "choose_plans", choose)


@pytest.mark.usefixtures("second_plan")
def test_engines_read_the_plans_of_this_machine_and_no_others() -> None:
    # The text encoder's weights hold the layer norm that the pipeline itself computes; its graph is in the plan.
    assert find_size(make_candidate(CandidateKind.ENGINES)) == 10 + 1_000 + 10_000 + 100_000 + 1_000_000
    assert find_size(make_candidate(CandidateKind.BUNDLE)) == find_size(make_candidate(CandidateKind.ENGINES))


def test_engines_that_do_not_run_here_count_with_all_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MissingHardware("there is no GPU")

    monkeypatch.setattr(describe_module, "choose_plans", refuse)
    assert find_size(make_candidate(CandidateKind.ENGINES)) == sum(SIZES.values()) - 1


def test_torch_reads_weights_and_neither_graphs_nor_plans() -> None:
    assert find_size(make_candidate(CandidateKind.TORCH)) == 10 + 100_000 + 1_000_000
    quantized = SimpleNamespace(weights_bytes=100_000, weights_bytes_16bit=200_000)
    assert find_size(make_candidate(CandidateKind.TORCH, quantization=quantized)) == 10 + 200_000 + 1_000_000


def test_another_tool_has_no_files_of_ours() -> None:
    peer = make_candidate(CandidateKind.PEER, build=BuildRecord(wall_ns=5, reused=()))
    assert (find_size(peer), find_build_time(peer), describe_audits(peer)) == (None, None, {})


def test_only_a_whole_build_has_a_time() -> None:
    whole, part = BuildRecord(wall_ns=5, reused=()), BuildRecord(wall_ns=5, reused=("graph",))
    assert find_build_time(make_candidate(CandidateKind.ENGINES, build=whole)) == 5
    assert find_build_time(make_candidate(CandidateKind.ENGINES, build=part)) is None
    assert find_build_time(make_candidate(CandidateKind.ENGINES)) is None
    assert find_build_time(make_candidate(CandidateKind.TORCH, build=whole)) is None


def test_an_audit_is_a_line_with_the_parity_and_the_plans() -> None:
    outputs = tuple(
        OutputParity(name=n, max_abs=1, relative_l2=e, cosine_distance=0) for n, e in (("a", 1e-3), ("b", 0.02))
    )
    parity = ParityRecord(passed=True, runtime="", outputs=outputs, relative_l2_limit=1, cosine_distance_limit=1)
    audits = describe_audits(make_candidate(CandidateKind.ENGINES, parity=parity))
    assert audits[ComponentName.UNET] == (
        "fp16 on tensorrt-rtx; opset 22, 90 nodes, Softmax in 4 of 4 attention layers; parity error 2.0e-02"
    )
    assert audits[ComponentName.TEXT_ENCODER].count("attention 4 of 4 native, 4 fused; 1 layers in another") == 2
    assert "9 of 10 sampled weights found" in audits[ComponentName.TEXT_ENCODER]
    assert "\n" not in "".join(audits.values())
    assert describe_audits(make_candidate(CandidateKind.TORCH)) == {}
