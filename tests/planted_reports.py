"""Planted reports and drawings for the tests of the bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bench.case.report import (
    BenchReport,
    CandidateKind,
    CandidateRecord,
    CaseRecord,
    ComponentErrorRecord,
    Conditions,
    DeviceMemoryRecord,
    LayerRecord,
    MachineRecord,
    MethodRecord,
    PictureRecord,
    ProcessRecord,
    RooflineRecord,
    Scope,
    Stage,
    Status,
)
from sdopt.bench.run import BenchResult
from sdopt.bundle.records import BlockRecord, QuantizationRecord, SpeedupRecord
from sdopt.fidelity.drawings import Drawing
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.model.backend_settings import OpenVINOSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.quantization import CalibrationSettings, ComponentQuantization, Scheme

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
            prompt=prompt, seed=index, psnr_db=psnr_db, ssim=1.0 if psnr_db is None else 0.985,
            ms_ssim=1.0 if psnr_db is None else 0.99, latent_cosine_min=1.0 if psnr_db is None else 0.999,
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
    if not count:
        return BenchResult(report, {}, None)
    reference = make_drawing(count)
    shifts = {"engines": 0.02, "eager-bf16": 0.01, "compile": 0.001}
    drawings = {name: make_drawing(count, shift) for name, shift in shifts.items() if report.candidate(name)}
    return BenchResult(report, {**drawings, "eager-fp32": reference}, reference)


def make_full_process(position: int, whole_ms: tuple[int, ...]) -> ProcessRecord:
    """One with every figure that a process can have on a CPU."""
    base = make_process(position, whole_ms)
    median_ms = sorted(whole_ms)[len(whole_ms) // 2]
    return base.model_copy(
        update={
            "samples_ns": {**base.samples_ns, Stage.FIRST_STEP: tuple(ms * MS // 3 for ms in whole_ms)},
            "warm_up_ns": tuple(ms * MS for ms in whole_ms[:3]),
            "sweep_ns": {1: (median_ms * MS // 2,) * 2, 5: (2 * median_ms * MS, 2 * median_ms * MS + 1000)},
            "energy_j": 3.5,
            "energy_source": "rapl",
            "rss_imported_bytes": 180_000_000,
            "rss_loaded_bytes": 390_000_000,
            "conditions": Conditions(
                neighbours_cores=0.01, clock_mhz=(2990.0, 3010.0), throttled=0, steal_cores=0.0, clock_steps=0
            ),
        }
    )


def make_full_fidelity(prompts: tuple[str, ...], distance: float) -> tuple[PictureRecord, ...]:
    """Pictures whose latents part from torch's a little more with each step."""
    return tuple(
        picture.model_copy(
            update={
                "latent_cosines": tuple(1 - distance * step for step in (1, 2, 4)),
                "ciede2000_mean": 0.42,
                "ciede2000_p99": 1.7,
            }
        )
        for picture in make_fidelity(prompts)
    )


def make_quantization() -> QuantizationRecord:
    """Of two blocks, one of which stayed in 16 bits."""
    kept = BlockRecord(
        name="down_blocks.0.attentions.0", layers=12, scheme=Scheme.INT8, quantized=True, reason="", error=0.0123,
        speedup=SpeedupRecord(value=1.08, low=1.05, high=1.1),
    )  # fmt: skip
    refused = BlockRecord(
        name="up_blocks.3.resnets.1", layers=4, scheme=Scheme.INT8, quantized=False, error=0.091, speedup=None,
        reason="its error of 9.1 % is above the 5 % that one block may have, and it was therefore not timed",
    )  # fmt: skip
    return QuantizationRecord(
        settings=ComponentQuantization(scheme=Scheme.INT8), calibration=CalibrationSettings(), trajectories="cd" * 32,
        runtime="OpenVINO 2026.2", blocks=(kept, refused), error_limit=0.05, base_error=0.012, error=0.014,
        speedup=SpeedupRecord(value=1.08, low=1.05, high=1.1), integer_layers=12, weights_bytes=900_000_000,
        weights_bytes_16bit=1_700_000_000,
    )  # fmt: skip


def make_full_report(prompts: tuple[str, ...] = ("a red circle", "a star")) -> BenchReport:
    """Five candidates, every section filled: engines with layers, three kinds of torch, and a peer that failed."""
    engines_ms, compile_ms = (100, 104, 96, 110, 101, 99, 103, 102), (140, 139, 143, 141, 170, 140, 138, 142)
    eager_ms, bf16_ms = (240, 250, 245, 260, 247, 244, 243, 251), (238, 251, 243, 262, 249, 241, 246, 250)
    layers = tuple(
        LayerRecord(component=ComponentName.UNET, layer=f"mid_block.attentions.{index}", relative_error=error,
                    tolerance=0.004)
        for index, error in enumerate((0.001, 0.002, 0.0052, 0.003))
    )  # fmt: skip

    def processes(whole_ms: tuple[int, ...], *positions: int) -> tuple[ProcessRecord, ...]:
        shift = {position: place for place, position in enumerate(positions)}
        return tuple(make_full_process(p, tuple(ms + shift[p] for ms in whole_ms)) for p in positions)

    error = ComponentErrorRecord(relative_error=0.011, max_error=0.2, cosine=0.99994)
    base = make_report(
        prompts, processes=processes(engines_ms, 0, 7), fidelity=make_full_fidelity(prompts, 2e-5),
        size_bytes=12_000_000, build_ns=31_000 * MS, errors={ComponentName.UNET: error}, layers=layers,
    )  # fmt: skip
    more = (
        make_candidate("eager-fp32", (), prompts, processes=processes(eager_ms, 1, 6), label="torch eager fp32"),
        make_candidate(
            "eager-bf16", (), prompts, processes=processes(bf16_ms, 2, 5), label="torch eager bf16",
            precision=Precision.BF16, fidelity=make_full_fidelity(prompts, 4e-5),
        ),
        make_candidate(
            "compile", (), prompts, processes=processes(compile_ms, 3, 4),
            label="torch.compile fp32, max-autotune, channels last", fidelity=make_full_fidelity(prompts, 1e-8),
        ),
        make_candidate(
            "optimum", (), (), label="optimum, ONNX Runtime fp32", status=Status.FAILED, kind=CandidateKind.PEER,
            message="the peer's Python has no optimum: pip install optimum[onnxruntime] there", processes=(),
        ),
    )  # fmt: skip
    return base.model_copy(
        update={
            "candidates": (base.candidates[0], *more),
            "case": base.case.model_copy(
                update={
                    "flops": {ComponentName.UNET: 40_000_000_000, ComponentName.VAE_DECODER: 6_000_000_000},
                    "inputs_digest": "ef" * 32,
                    "quantization": {ComponentName.UNET: make_quantization()},
                }
            ),
            "roofline": (
                RooflineRecord(device="cpu", precision=Precision.FP32, flops_per_s=2.5e12, copy_bytes_per_s=2.2e10),
                RooflineRecord(device="cpu", precision=Precision.BF16, flops_per_s=7.5e12, copy_bytes_per_s=2.2e10),
            ),
            "audits": {"engines": {ComponentName.UNET: "1,024 nodes, 16 of 16 attentions as one Attention node"}},
            "notes": ("the layers of torch.compile have no names to compare",),
            "plugins": {"LPIPS": "not measured (no weights)", "CLIP score": "measured with clip (sha256 0123)"},
            "method": base.method.model_copy(
                update={
                    "order": ("engines", "eager-fp32", "eager-bf16", "compile", "compile", "eager-bf16", "eager-fp32",
                              "engines"),
                    "settle_window": 3, "settle_tolerance": 0.02, "most_warm_up": 20, "suite": "nightly",
                }
            ),
        }
    )  # fmt: skip


def make_unet_report() -> BenchReport:
    """Of the UNet alone: nothing was drawn."""
    base = make_report((), fidelity=())
    steps = {Stage.UNET_STEP: (4100 * MS, 4150 * MS, 4090 * MS)}
    slower = {Stage.UNET_STEP: (9100 * MS, 9350 * MS, 9190 * MS)}
    candidates = tuple(
        record.model_copy(
            update={
                "fidelity": (),
                "processes": tuple(p.model_copy(update={"samples_ns": samples}) for p in record.processes),
            }
        )
        for record, samples in zip(base.candidates, (steps, slower), strict=True)
    )
    case = base.case.model_copy(update={"scope": Scope.UNET, "width_px": 512, "height_px": 512})
    return base.model_copy(update={"candidates": candidates, "case": case})


BUNDLE = Path("bundle")
