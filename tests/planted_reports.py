"""Planted reports and drawings for the tests of the bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdopt.artifacts.manifest import EnvironmentRecord
from sdopt.bench.report import (
    BenchReport,
    CandidateKind,
    CandidateRecord,
    CaseRecord,
    Conditions,
    DeviceMemoryRecord,
    MachineRecord,
    MethodRecord,
    PictureRecord,
    ProcessRecord,
    Stage,
    Status,
)
from sdopt.bench.run import BenchResult
from sdopt.fidelity.draw import Drawing
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import OpenVINOSettings, TorchSettings

MS = 1_000_000


def make_process(position: int, whole_ms: tuple[int, ...]) -> ProcessRecord:
    return ProcessRecord(
        position=position, import_ns=2000 * MS, load_ns=300 * MS, first_picture_ns=900 * MS, cold_start_ns=3200 * MS,
        peak_rss_bytes=500_000_000,
        samples_ns={
            Stage.TEXT_ENCODER: tuple(5 * MS for _ in whole_ms),
            Stage.UNET_STEP: tuple(ms * MS // 4 for ms in whole_ms for _ in range(3)),
            Stage.VAE_DECODER: tuple(10 * MS for _ in whole_ms),
            Stage.OVERHEAD: tuple(ms * MS // 4 - 15 * MS for ms in whole_ms),
            Stage.END_TO_END: tuple(ms * MS for ms in whole_ms),
        },
    )  # fmt: skip


def make_gpu_processes() -> tuple[ProcessRecord, ...]:
    """Two processes on a GPU: the second held more of it for its UNet."""
    text_encoder = DeviceMemoryRecord(weights_bytes=250_000_000, activations_bytes=90_000_000, buffers_bytes=1_000_000)
    unet = DeviceMemoryRecord(weights_bytes=1_700_000_000, activations_bytes=400_000_000, buffers_bytes=2_000_000)
    larger = unet.model_copy(update={"activations_bytes": 600_000_000})
    return tuple(
        make_process(position, (100, 104)).model_copy(
            update={
                "peak_device_bytes": 3_100_000_000,
                "torch_peak_device_bytes": 700_000_000,
                "device_memory": {ComponentName.TEXT_ENCODER: text_encoder, ComponentName.UNET: each},
            }
        )
        for position, each in ((0, unet), (3, larger))
    )


def make_fidelity(prompts: tuple[str, ...], psnr_db: float | None = 45.0) -> tuple[PictureRecord, ...]:
    return tuple(
        PictureRecord(
            prompt=prompt, seed=index, psnr_db=psnr_db, ssim=0.985, ms_ssim=0.99, latent_cosine_min=0.999,
            noise_floor_psnr_db=None, noise_floor_ssim=1.0,
        )
        for index, prompt in enumerate(prompts)
    )  # fmt: skip


def make_candidate(name: str, whole_ms: tuple[int, ...], prompts: tuple[str, ...], **changes: Any) -> CandidateRecord:
    engines = name == "engines"
    settings = OpenVINOSettings(inference_precision=Precision.BF16) if engines else TorchSettings()
    values: dict[str, Any] = {
        "name": name,
        "label": "OpenVINO bf16" if engines else f"torch {name}",
        "precision": Precision.BF16 if engines else Precision.FP32,
        "settings": {ComponentName.UNET: settings},
        "status": Status.OK,
        "kind": CandidateKind.ENGINES if engines else CandidateKind.TORCH,
        "processes": (make_process(0, whole_ms), make_process(3, whole_ms)),
        "fidelity": make_fidelity(prompts, 45.0 if engines else None),
    }
    return CandidateRecord(**values | changes)


def make_report(
    prompts: tuple[str, ...] = ("a red circle", "a star"), *more: CandidateRecord, **engines: Any
) -> BenchReport:
    return BenchReport(
        created_utc="2026-01-02T03:04:05+00:00",
        case=CaseRecord(
            bundle="tiny", digest="ab" * 32, bundle_bytes=12_345_678, family="sd1", width_px=64, height_px=64, batch=1,
            prompts=prompts, seed=0, steps=3, guidance_scale=5.0, scheduler="PLMS",
        ),
        environment=EnvironmentRecord(
            sdopt="0.1", python="3.11", system="Linux x86_64", processor="A processor", cpu_features=("avx2",),
            libraries={"torch": "2.13"},
        ),
        machine=MachineRecord(
            logical_cores=2, memory_bytes=24_000_000_000, conditions=Conditions(neighbours_cores=0.02)
        ),
        method=MethodRecord(
            repeats=2, least_pictures=2, most_pictures=10, picture_budget_s=6, time_limit_s=1800,
            order=("engines", "eager-fp32", "eager-fp32", "engines"), command="sdopt bench out/b --report out/r",
        ),
        candidates=(
            make_candidate("engines", (100, 104, 96, 110), prompts, **engines),
            make_candidate("eager-fp32", (240, 250, 245, 260), prompts),
            *more,
        ),
    )  # fmt: skip


def make_drawing(count: int, shift: float = 0.0) -> Drawing:
    y, x = np.mgrid[0:64, 0:64] / 64
    image = np.stack([0.2 + 0.5 * x, 0.3 + 0.4 * y, 0.5 + 0 * x], axis=-1) + shift
    latents = np.zeros((count, 3, 4, 16, 16), np.float32)
    return Drawing(np.stack([image] * count).astype(np.float32), latents, "PLMS")


def make_result(report: BenchReport) -> BenchResult:
    count = len(report.case.prompts)
    reference = make_drawing(count)
    return BenchResult(report, {"engines": make_drawing(count, 0.02), "eager-fp32": reference}, reference)


BUNDLE = Path("bundle")
