"""Where the limits of the fidelity verdict come from: backends, precisions and planted faults against torch fp32.

    sdopt convert sdopt/assets/tiny-shapes -o out/tiny-shapes
    python benchmarks/fidelity_calibration.py out/tiny-shapes

Draws the same scene with each and prints the worst picture's PSNR and SSIM. A limit is right when every sound candidate
is above it and the faults that matter are below.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from sdopt.backends.probes import probe_backend
from sdopt.bundle.manifest import read_manifest
from sdopt.fidelity.candidate import open_candidate
from sdopt.fidelity.compare_drawings import compare_drawings, format_psnr
from sdopt.fidelity.drawings import draw_scene
from sdopt.fidelity.scene import DEFAULT_PROMPTS, Scene, write_scene
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings, TorchSettings
from sdopt.model.precision import Precision

_PROMPTS = (*DEFAULT_PROMPTS, "a small green star on a white background", "a large black square on a red background")
_SOUND: dict[str, BackendSettings] = {
    "torch fp32, another attention kernel": TorchSettings(attention="math"),
    "torch bf16": TorchSettings(precision=Precision.BF16),
    "ONNX Runtime fp32": OnnxRuntimeSettings(),
    "OpenVINO fp32": OpenVINOSettings(),
    "OpenVINO bf16": OpenVINOSettings(inference_precision=Precision.BF16),
}


def scale_parameters(factor: float, part: str) -> Callable[[torch.nn.Module], None]:
    """A fault: every parameter of the UNet whose name holds `part`, times `factor`."""

    def plant(network: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if part in name:
                    parameter.mul_(factor)

    return plant


_FAULTS = {
    "all UNet weights 5 % too large": scale_parameters(1.05, ""),
    "all UNet weights 1 % too large": scale_parameters(1.01, ""),
    "attention scale 41 % too large": scale_parameters(1.41, "to_q.weight"),
    "attention scale 5 % too large": scale_parameters(1.05, "to_q.weight"),
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=10, show_default=True)
def main(folder: Path, steps: int) -> None:
    manifest = read_manifest(folder)
    with tempfile.TemporaryDirectory() as work:
        scene = Scene(
            prompts=_PROMPTS, seed=0, steps=steps, guidance_scale=5.0, inputs=Path(work) / "inputs.safetensors"
        )
        write_scene(folder, manifest, scene)

        def draw(settings: BackendSettings, plant: Callable[[torch.nn.Module], None] | None = None) -> Any:
            with open_candidate(folder, manifest, settings) as pipeline:
                if plant is not None:
                    plant(pipeline.unet.session.engine)
                return draw_scene(pipeline, manifest, scene, lambda share: None)

        reference = draw(TorchSettings())
        rows = [(name, draw(settings)) for name, settings in _SOUND.items() if _runs(settings)]
        rows += [(f"planted: {name}", draw(TorchSettings(), plant)) for name, plant in _FAULTS.items()]
        for name, drawing in rows:
            images = compare_drawings(scene, reference, drawing)
            worst = min(images, key=lambda image: float("inf") if image.psnr_db is None else image.psnr_db)
            print(f"{name}: {format_psnr(worst.psnr_db)}, SSIM {min(image.ssim for image in images):.4f}", flush=True)


def _runs(settings: BackendSettings) -> bool:
    probe = probe_backend(settings)
    wanted = getattr(settings, "inference_precision", Precision.FP32)
    return probe.available and wanted in probe.precisions


if __name__ == "__main__":
    main()
