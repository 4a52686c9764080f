"""The fidelity stage of a build: a verdict is taken from the store only where torch drew on the same device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdopt.artifacts.manifest import FidelityRecord, GpuRecord, Verdict
from sdopt.artifacts.store import Store
from sdopt.build import judge as judge_module
from sdopt.build.judge import judge
from sdopt.build.staging import Staging
from sdopt.fidelity import verdict as verdict_module
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
        assert judge(draft.model_copy(update={"environment": environment}), store, staging) == PASS
        assert judged == count
