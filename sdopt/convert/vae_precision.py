"""Can fp16 hold what the VAE computes? Measured on pictures, because some VAEs draw black in fp16 (SDXL's does).

`choose_vae_precisions` looks at each half of the VAE that is to compute in fp16. A child process runs both halves in
fp32 on seeded pictures and on the latents that the encoder makes of them, and notes how large each layer's values get.
Where they come near fp16's largest number, bf16 is taken instead, which has the range of fp32 and 8 of its 24 bits;
where that is too coarse for the picture, or the runtime takes no bf16 graph, fp32. What was measured is kept in the
store.

No later proof finds an overflow on a machine without a GPU: ONNX Runtime's CPU kernels hand the values of an fp16 graph
on in fp32 (tests/slow/test_vae_precision.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from sdopt import progress
from sdopt.convert.plan import BuildPlan, PrecisionChoice
from sdopt.disk.digest import digest_of
from sdopt.disk.store import Store, cache_root
from sdopt.fidelity.metrics import compute_psnr, to_picture
from sdopt.fidelity.picture_limits import LIMITS
from sdopt.fidelity.scene import paint_image
from sdopt.model.backend_settings import TensorRTSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable
from sdopt.weights.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGE = "vae_precision"
_RECORD_NAME = "measured.json"
# Raise it when what is measured changes: nothing of before is used again.
_FORMAT = 1
_ENCODER, _DECODER = ComponentName.VAE_ENCODER, ComponentName.VAE_DECODER

LARGEST_FP16 = 65504.0
# From pictures of this side to those of 512 px the largest value grows by less than a half: benchmarks/vae_overflow.py.
# The rest of the factor is for larger ones, and for latents that no encoder gives, which strong guidance brings about.
HEADROOM = 4.0
SIDE_PX = 192
_LEAST_PSNR_DB = LIMITS[Precision.BF16].psnr_db


@dataclass(frozen=True)
class HalfMeasurement:
    """One half of the VAE: its largest value and the layer that has it, and what bf16 does to the pictures.

    `bf16_psnr_db` is the worst picture's distance from fp32's; None where fp16 is safe and bf16 was not tried.
    """

    layer: str
    largest: float
    bf16_psnr_db: float | None = None

    @property
    def fits_fp16(self) -> bool:
        return self.largest * HEADROOM <= LARGEST_FP16


@dataclass(frozen=True)
class MeasureJob:
    """What the child needs, as it crosses to it in JSON: config and tensors of both halves, and the pictures' size."""

    configs: dict[ComponentName, dict[str, Any]]
    tensors: dict[ComponentName, dict[str, TensorRef]]
    height_px: int
    width_px: int


_JOB = TypeAdapter(MeasureJob)
_MEASURED = TypeAdapter(dict[ComponentName, HalfMeasurement])


def choose_vae_precisions(plan: BuildPlan) -> dict[ComponentName, PrecisionChoice]:
    """The precision of each half of the VAE that `plan` computes in fp16, and why; nothing for a plan without one.

    A precision that the recipe fixes for the component stays; the reason then says what speaks against it.
    """
    halves = [name for name in (_DECODER, _ENCODER) if plan.components[name].graph_dtype is DType.FP16]
    if not halves:
        return {}
    measured = _find_or_measure(plan)
    return {name: _choose(plan, name, measured[name]) for name in halves}


def _choose(plan: BuildPlan, name: ComponentName, measured: HalfMeasurement) -> PrecisionChoice:
    figure = f"largest value {measured.largest:.4g} of fp16's {LARGEST_FP16:.0f} ({measured.layer})"
    if name in plan.recipe.component_precision:
        verdict = "which holds it" if measured.fits_fp16 else f"which could overflow: {HEADROOM:.0f} times are wanted"
        return PrecisionChoice(Precision.FP16, f"fixed by the recipe, {verdict}: {figure}")
    if measured.fits_fp16:
        return PrecisionChoice(Precision.FP16, figure)
    if not isinstance(plan.components[name].backend, TensorRTSettings):
        return PrecisionChoice(Precision.FP32, f"fp16 could overflow: {figure}; ONNX Runtime takes no bf16 graph")
    psnr_db = measured.bf16_psnr_db or 0.0
    rounding = f"pictures in bf16 are {psnr_db:.1f} dB from fp32's (at least {_LEAST_PSNR_DB:.0f} dB)"
    choice = Precision.BF16 if psnr_db >= _LEAST_PSNR_DB else Precision.FP32
    return PrecisionChoice(choice, f"fp16 could overflow: {figure}; {rounding}")


def _find_or_measure(plan: BuildPlan) -> dict[ComponentName, HalfMeasurement]:
    store, key = Store(cache_root()), _measurement_key(plan)
    if (folder := store.find(STAGE, key)) is not None:
        return _MEASURED.validate_json((folder / _RECORD_NAME).read_bytes())
    progress.update("looking how large the VAE's values get", 0.0)
    arguments = _JOB.dump_python(describe_job(plan), mode="json")
    outcome = call(measure_in_child, arguments)
    store.put(STAGE, key, {_RECORD_NAME: json.dumps(outcome.value).encode()})
    return _MEASURED.validate_python(outcome.value)


def describe_job(plan: BuildPlan) -> MeasureJob:
    """Pictures are of `SIDE_PX`, or of the plan's usual size where that is smaller."""
    parts = {name: plan.components[name] for name in (_ENCODER, _DECODER)}
    return MeasureJob(
        {name: dict(part.config) for name, part in parts.items()},
        {name: dict(part.tensors) for name, part in parts.items()},
        min(SIDE_PX, plan.profile.height_px.opt), min(SIDE_PX, plan.profile.width_px.opt),
    )  # fmt: skip


def _measurement_key(plan: BuildPlan) -> str:
    job = describe_job(plan)
    return digest_of(
        {
            "format": _FORMAT,
            "configs": job.configs,
            "weights": {name: plan.components[name].weights_key for name in job.tensors},
            "size": [job.height_px, job.width_px],
            "limit": [HEADROOM, _LEAST_PSNR_DB],
            "libraries": {name: version(name) for name in ("torch", "diffusers")},
        }
    )


def measure_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: a `HalfMeasurement` for each half, by its name."""
    measured: JsonTable = _MEASURED.dump_python(measure_halves(_JOB.validate_python(arguments)), mode="json")
    return measured


def measure_halves(job: MeasureJob) -> dict[ComponentName, HalfMeasurement]:
    """Run both halves in fp32, and in bf16 the one that fp16 might not hold. It takes the memory of fp32."""
    import torch

    with torch.inference_mode():
        return _measure(job)


def _measure(job: MeasureJob) -> dict[ComponentName, HalfMeasurement]:
    from sdopt.networks.overflow import find_largest, watch_magnitudes

    pictures = _paint_pictures(job.height_px, job.width_px)
    encoder, decoder = (_open(job, name, DType.FP32) for name in (_ENCODER, _DECODER))
    with watch_magnitudes(encoder) as in_encoder:
        latents = [_encode(encoder, picture) for picture in pictures]
    with watch_magnitudes(decoder) as in_decoder:
        decoded = [decoder(latent) for latent in latents]
        decoder(_draw_noise(job, latents[0]))
    measured = {
        _ENCODER: HalfMeasurement(*find_largest(in_encoder)), _DECODER: HalfMeasurement(*find_largest(in_decoder))
    }  # fmt: skip
    if not measured[_DECODER].fits_fp16:
        coarse = _open(job, _DECODER, DType.BF16)
        rounded = [coarse(latent.bfloat16()) for latent in latents]
        measured[_DECODER] = dataclasses.replace(measured[_DECODER], bf16_psnr_db=_worst_psnr_db(decoded, rounded))
    if not measured[_ENCODER].fits_fp16:
        coarse = _open(job, _ENCODER, DType.BF16)
        rounded = [decoder(_encode(coarse, picture.bfloat16()).float()) for picture in pictures]
        measured[_ENCODER] = dataclasses.replace(measured[_ENCODER], bf16_psnr_db=_worst_psnr_db(decoded, rounded))
    return measured


def _open(job: MeasureJob, name: ComponentName, dtype: DType) -> nn.Module:
    from accelerate import init_empty_weights

    from sdopt.networks.modules import build_network, default_dtype
    from sdopt.weights.to_torch import TORCH_DTYPES, load_weights

    with default_dtype(TORCH_DTYPES[dtype]), init_empty_weights(include_buffers=False):
        network = build_network(name, job.configs[name])
    load_weights(network, job.tensors[name], TORCH_DTYPES[dtype])
    return network


def _encode(encoder: nn.Module, picture: Tensor) -> Tensor:
    """The mean of the latents' distribution, which is the first half of the moments."""
    moments: Tensor = encoder(picture)
    return moments.chunk(2, dim=1)[0]


def _draw_noise(job: MeasureJob, like: Tensor) -> Tensor:
    import torch

    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    return noise / float(job.configs[_DECODER].get("scaling_factor") or 1.0)


def _paint_pictures(height_px: int, width_px: int) -> list[Tensor]:
    """[1,3,height,width] in -1..1: a scene with soft and hard edges, a saturated checkerboard, a white dot on black.

    What a norm gives for a detail is the larger the rarer the detail is in the picture: hence the dot.
    """
    import torch

    rows, columns = np.mgrid[0:height_px, 0:width_px]
    colours = np.array([(255, 0, 0), (0, 255, 255), (0, 0, 255), (255, 255, 0)], np.uint8)
    checkerboard = colours[(rows // 8 % 2) * 2 + columns // 8 % 2]
    dot = np.zeros((height_px, width_px, 3), np.uint8)
    dot[height_px // 2 :, width_px // 2 :][:2, :2] = 255
    pictures = [torch.from_numpy(picture) for picture in (paint_image(height_px, width_px, 0), checkerboard, dot)]
    return [picture.permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in pictures]


def _worst_psnr_db(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    return min(_psnr_db(a, b) for a, b in zip(expected, actual, strict=True))


def _psnr_db(expected: Tensor, actual: Tensor) -> float:
    if not (bool(expected.isfinite().all()) and bool(actual.isfinite().all())):
        return 0.0
    a, b = (to_picture((image[0].float() / 2 + 0.5).permute(1, 2, 0).numpy()) for image in (expected, actual))
    return compute_psnr(a, b)
