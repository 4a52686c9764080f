"""The report's format: it survives JSON, and refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from sdopt.bench.case.report import SCHEMA_VERSION, CandidateRecord, Stage, Status, read_report, write_report
from sdopt.errors import ArtifactError
from sdopt.model.precision import Precision
from tests.planted_reports import make_gpu_processes, make_report


def test_a_report_survives_the_file(tmp_path: Path) -> None:
    report = make_report()
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report


def test_the_memory_of_each_network_survives_the_file(tmp_path: Path) -> None:
    report = make_report(processes=make_gpu_processes())
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    values = json.loads(report.to_json())
    values["candidates"][0]["processes"][0]["device_memory"]["unet"]["context_bytes"] = 1
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="context_bytes"):
        read_report(tmp_path / "report.json")


def test_raw_samples_are_stored_and_statistics_are_not(tmp_path: Path) -> None:
    text = make_report().to_json().decode()
    assert "samples_ns" in text
    assert "median" not in text
    assert "p90" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 5}, "has schema 5"),
        ({"extra": 1}, "extra"),
        ({"candidates": []}, "candidates"),
        ({"case": {}}, "case"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    values = json.loads(make_report().to_json()) | change
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=words):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damage_has_a_clear_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


def test_a_missing_file_has_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        read_report(tmp_path / "none.json")


def test_a_failure_without_a_message_is_refused() -> None:
    with pytest.raises(ValidationError, match="without a message"):
        CandidateRecord(name="x", label="X", precision=Precision.FP32, settings={}, status=Status.FAILED)


def test_samples_are_grouped_by_process() -> None:
    engines = make_report().candidate("engines")
    assert engines is not None
    assert [len(group) for group in engines.samples_of(Stage.END_TO_END)] == [4, 4]
    assert engines.samples_of(Stage.VAE_ENCODER) == ()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_report_of_an_older_schema_is_read(tmp_path: Path, version: int) -> None:
    values = json.loads(make_report().to_json()) | {"schema_version": version}
    del values["case"]["quantization"]
    values["machine"] |= values["machine"].pop("conditions")
    for new in ("clock_mhz", "throttled", "steal_cores", "clock_steps"):
        del values["machine"][new]
    for candidate in values["candidates"]:
        del candidate["kind"]
        for process in candidate["processes"]:
            del process["peak_device_bytes"], process["torch_peak_device_bytes"], process["device_memory"]
    (tmp_path / "report.json").write_text(json.dumps(values))
    report = read_report(tmp_path / "report.json")
    assert report == make_report()
    assert report.schema_version == SCHEMA_VERSION == 4
