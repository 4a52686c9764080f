"""scripts/gpu's own way, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_the_dry_run_measures_builds_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--dry", "--minutes", "10", "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=500)
    assert result.returncode == 0, result.stderr
    case = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]["tiny-shapes"]
    assert case["unet_step_flops"] > 1e8
    eager, ort, rtx = case["candidates"]
    for row in (eager, ort):
        assert not row["message"]
        assert {"text_encoder", "unet_step", "vae_decoder", "overhead", "end_to_end"} == set(row["stages_ms"])
        assert row["pictures_per_s"] > 0
        assert row["peak_device_bytes"] is None
    assert eager["psnr_db"] is None
    assert ort["ssim"] > 0.99
    assert rtx["message"] or rtx["stages_ms"]
    assert result.stdout.count("torch eager fp32") == 1
