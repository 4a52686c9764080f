"""Joules from a folder like Linux's of RAPL, and from a double of NVML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdopt.bench.measure.energy import NvmlMeter, RaplMeter, open_meter
from tests.nvml_double import FakeNvml


def set_zone(folder: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1_000_000_000) -> None:
    (folder / zone).mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / zone / file).write_text(f"{value}\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    def set_all(step: int) -> None:
        set_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000 + step * 2_000_000)
        set_zone(tmp_path, "intel-rapl:1", "package-1", 8_000_000 + step * 1_500_000)
        set_zone(tmp_path, "intel-rapl:0:0", "core", step * 900_000_000)
        set_zone(tmp_path, "intel-rapl:2", "psys", step * 900_000_000)

    set_all(0)
    meter = RaplMeter(tmp_path)
    meter.start()
    set_all(1)
    assert meter.read_j() == pytest.approx(3.5)


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    set_zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    meter = RaplMeter(tmp_path)
    meter.start()
    set_zone(tmp_path, "intel-rapl:0", "package-0", 4_000_000)
    assert meter.read_j() == pytest.approx(5.0)


def test_what_cannot_be_read_is_null(tmp_path: Path) -> None:
    meter = RaplMeter(tmp_path / "absent")
    meter.start()
    assert meter.read_j() is None
    set_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = RaplMeter(tmp_path)
    meter.start()
    # Root is refused nothing, so a folder stands for the file that only root may read.
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    assert meter.read_j() is None


def test_a_gpu_counts_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(used_mj=7_000_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    with open_meter("abc") as meter:
        assert meter is not None
        meter.start()
        nvml.used_mj = 7_002_500
        assert (meter.read_j(), meter.name) == (2.5, "nvml")
    with open_meter("other") as meter:
        assert meter is None
    with open_meter(None) as meter:
        assert meter is not None
        assert meter.name == "rapl"


def test_a_gpu_that_does_not_count_is_null() -> None:
    meter = NvmlMeter(FakeNvml(used_mj=None), "GPU-abc")
    meter.start()
    assert meter.read_j() is None
