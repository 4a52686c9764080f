"""The fidelity stage of a build: a verdict is taken from the store only where torch drew on the same device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import FidelityRecord, Verdict
from sdopt.convert import fidelity as judge_module
from sdopt.convert.fidelity import PictureJudge, judge
from sdopt.disk.digest import FileRecord
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store
from sdopt.fidelity import verdict as verdict_module
from sdopt.machine.machine_record import GpuRecord
from tests.planted_plans import make_machine, make_plan, with_plans
from tests.reference_session import make_bundle

PASS = FidelityRecord(verdict=Verdict.PASS, reason="they are equal")


def test_a_verdict_counts_for_the_device_that_torch_drew_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = 0
    staging, store = Staging(tmp_path / "out"), Store(tmp_path / "cache")
    staging.folder.rmdir()
    draft = make_bundle(staging.folder).manifest

    def judge_fidelity(*args: Any) -> FidelityRecord:
        nonlocal judged
        judged += 1
        return PASS

    monkeypatch.setattr(verdict_module, "judge_fidelity", judge_fidelity)
    gpu = GpuRecord(name="NVIDIA L4", generation="sm89", memory_bytes=24 << 30, driver="580.65.06", cuda="13.0")
    with_gpu = draft.environment.model_copy(update={"gpus": (gpu,)})
    newer = draft.environment.model_copy(update={"gpus": (gpu.model_copy(update={"driver": "590.1"}),)})
    for device, environment, count in (
        ("cpu", draft.environment, 1),
        ("cpu", with_gpu, 1),
        ("cuda", with_gpu, 2),
        ("cuda", with_gpu, 2),
        ("cuda", newer, 3),
    ):
        monkeypatch.setattr(judge_module, "find_reference_device", lambda manifest, device=device: device)
        assert judge(draft.model_copy(update={"environment": environment}), PictureJudge(store, staging)) == PASS
        assert judged == count


@pytest.mark.parametrize(
    ("generation", "verdict", "said"),
    [
        ("sm89", Verdict.PASS, "they are equal"),
        ("sm120", Verdict.GRAPHS_PASS, "there are plans for sm89, and the NVIDIA GeForce RTX 4090 here is sm120"),
        (None, Verdict.GRAPHS_PASS, "the plans need an NVIDIA GPU"),
    ],
)
def test_engines_are_drawn_where_they_run_and_their_graphs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str | None, verdict: Verdict, said: str
) -> None:
    """A machine with a GPU builds plans for another generation, too, and must not try to open them."""
    staging, store = Staging(tmp_path / "out"), Store(tmp_path / "cache")
    staging.folder.rmdir()
    made = make_bundle(staging.folder).manifest
    draft = with_plans(made, {name: [make_plan("sm89", name)] for name in made.components})
    drawn: list[str] = []

    def judge_fidelity(folder: Path, manifest: BundleManifest, work: Path) -> FidelityRecord:
        drawn.extend(sorted({record.backend.kind for record in manifest.components.values()}))
        return PASS

    monkeypatch.setattr(verdict_module, "judge_fidelity", judge_fidelity)
    record = judge(draft, PictureJudge(store, staging, make_machine(generation)))
    assert record.verdict is verdict
    assert said in record.reason
    assert drawn == (["tensorrt-rtx"] if verdict is Verdict.PASS else ["onnxruntime"])


def test_a_verdict_counts_for_the_plans_that_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, store = Staging(tmp_path / "out"), Store(tmp_path / "cache")
    staging.folder.rmdir()
    made = make_bundle(staging.folder).manifest
    judged: list[str] = []

    def judge_fidelity(folder: Path, manifest: BundleManifest, work: Path) -> FidelityRecord:
        judged.append(manifest.files["unet/sm89.plan"].sha256[0])
        return PASS

    monkeypatch.setattr(verdict_module, "judge_fidelity", judge_fidelity)
    for digit in "aab":
        files = {"unet/sm89.plan": FileRecord(sha256=digit * 64, size_bytes=1)}
        judge(made.model_copy(update={"files": files}), PictureJudge(store, staging))
    assert judged == ["a", "b"]
