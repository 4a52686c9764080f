"""What scripts/gpu reports: shares of a peak, rows, and reasons where the time or a library was missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import gpu_run
from benchmarks.gpu_run import Candidate, Case, Deadline, Row, Run, format_row, main, run_all
from benchmarks.roofline import find_peak_flops
from sdopt.backends.cuda import find_gpu
from sdopt.backends.protocol import ComponentFiles
from sdopt.bench.case.random_checkpoint import UNET_SD15, UNET_SDXL
from sdopt.bench.case.report import Stage
from sdopt.bench.measure.roofline import count_flops
from sdopt.errors import SdoptError
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.component import ComponentName, describe_component
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.shape import ShapeProfile

VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
EAGER = Candidate("torch eager fp32", TorchSettings())


@pytest.mark.parametrize(
    ("family", "config", "unet_tera", "vae_tera"),
    [(Family.SD1, UNET_SD15, 2 * 0.803, 2.51), (Family.SDXL, UNET_SDXL, 2 * 6.761, 10.47)],
)
def test_flops_of_the_published_networks(
    family: Family, config: dict[str, Any], unet_tera: float, vae_tera: float
) -> None:
    side_px = family.native_size_px
    extents = ShapeProfile.static(height_px=side_px, width_px=side_px).axis_extents(8)
    for name, values, expected in (
        (ComponentName.UNET, config | {"in_channels": 4, "out_channels": 4}, unet_tera),
        (ComponentName.VAE_DECODER, VAE, vae_tera),
    ):
        spec = describe_component(name, values, family, DType.FP16)
        files = ComponentFiles(Path(), spec, values, family, extents)
        assert count_flops(files) / 1e12 == pytest.approx(expected, rel=2e-3)


def test_peaks_are_found_by_the_whole_name() -> None:
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert find_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert find_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert find_peak_flops("NVIDIA L40S") == 362.05e12
    assert find_peak_flops("NVIDIA L4") == 121e12
    assert find_peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    for other in ("RTX 4090 Laptop GPU", "RTX 4090 D", "RTX 3090 Ti", "H100 80GB HBM3 MIG 1g.10gb"):
        assert find_peak_flops(f"NVIDIA GeForce {other}") is None
    assert find_peak_flops("NVIDIA GeForce GTX 1080") is None
    assert find_peak_flops("") is None


def test_a_row_has_figures_or_a_reason() -> None:
    stages = {Stage.TEXT_ENCODER: 1.0, Stage.UNET_STEP: 20.5, Stage.VAE_DECODER: 30.0, Stage.END_TO_END: 500.0}
    row = Row("TensorRT-RTX fp16", stages_ms=stages, pictures_per_s=2.0, unet_roofline=0.5, peak_device_bytes=4 * 10**9)
    text = format_row(row)
    assert [word for word in ("20.50", "50%", "30.00", "2.000", "4.00") if word not in text] == []
    assert format_row(Row("x", "no NVIDIA GPU: nvidia-smi")).endswith("no NVIDIA GPU: nvidia-smi")


class FakeRun(Run):
    """A case whose candidates take no time; `fails` is what its preparation says."""

    fails = ""

    def prepare(self) -> None:
        if self.fails:
            raise SdoptError(self.fails)
        self.flops = 10

    def _measure(self, row: Row, folder: Path, settings: Any) -> None:
        self.deadline.take()
        row.stages_ms, row.pictures_per_s = {Stage.UNET_STEP: 1.0}, 1.0


def test_the_report_is_renewed_after_each_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_run, "Run", FakeRun)
    written: list[int] = []

    def note(path: Path, data: bytes) -> None:
        written.append(len(json.loads(data)["cases"]["b"]["candidates"]) if b'"b"' in data else 0)
        path.write_bytes(data)

    monkeypatch.setattr(gpu_run, "write_file", note)
    cases, compiled = [Case("a", 1), Case("b", 1)], Candidate("torch.compile", EAGER.settings)
    table = run_all(cases, (EAGER, compiled), tmp_path, Deadline(100), None)
    assert written == [0, 1, 1, 2]
    assert json.loads((tmp_path / "report.json").read_text()) == table
    again = run_all(cases[:1], (EAGER,), tmp_path, Deadline(0), None)
    rows = {row["candidate"]: row["message"] for row in again["cases"]["a"]["candidates"]}
    assert rows == {"torch.compile": "", EAGER.name: "the time was up"}
    assert again["cases"]["b"] == table["cases"]["b"]


def test_what_the_time_did_not_reach_and_what_failed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_run, "Run", FakeRun)
    table = run_all([Case("late", 1)], (EAGER,), tmp_path, Deadline(1), None)
    assert table["cases"]["late"]["candidates"][0]["message"] == "the time was up"
    monkeypatch.setattr(FakeRun, "fails", "the disk is full")
    table = run_all([Case("full", 1)], (EAGER,), tmp_path, Deadline(99), None)
    messages = [row["message"] for row in table["cases"]["full"]["candidates"]]
    assert messages == ["not prepared: the disk is full"]


def test_a_generation_without_plans_is_a_reason_and_no_build(tmp_path: Path) -> None:
    candidate = gpu_run.list_candidates("sm90")["tensorrt-rtx"]
    run = Run(Case("x", 1), tmp_path, Deadline(100), "NVIDIA H200")
    assert "does not run on this GPU" in run.measure(candidate).message
    assert gpu_run.list_candidates("sm89")["tensorrt-rtx"].target == "rtx:sm89"


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(main, ["-o", str(tmp_path / "out")])
    assert result.exit_code == 5
    assert not (tmp_path / "out").exists()
