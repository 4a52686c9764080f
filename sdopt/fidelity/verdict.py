"""The fidelity verdict: do the engines draw what torch draws?

The same prompts, seeds and initial latents go through torch fp32 and through the engines, each in a fresh
process, and a third time through torch fp32 with another attention kernel: the noise floor, what rounding
alone does to the pictures.

**Limits.** Each picture has to reach a PSNR and an SSIM. They depend on the least precise engine, and on the
checkpoint:

* `LIMITS` holds one pair for each precision. On tiny-shapes (10 steps of DDIM, four prompts) fp32 in OpenVINO
  and ONNX Runtime reaches 89 dB, as does torch with another kernel; bf16 reaches 52.8 dB in torch and 50.6 dB
  in OpenVINO. Planted faults: all UNet weights 5 % too large 25.6 dB, 1 % too large 41.1 dB; attention scale
  41 % too large 32.5 dB, 5 % too large 50.3 dB. So a fault as small as bf16's own rounding is for the parity of
  components to find. (`benchmarks/fidelity_calibration.py` measures these again.)
* Some checkpoints amplify rounding more than others. An engine need not be closer to torch than torch is to
  itself: the limit is never above the noise floor with twice its root-mean-square error (6 dB).
* Quantised engines have a budget of their own (`PictureBudget`): so many dB less than the 16-bit engines reach.
* bf16 and fp16 that miss their limit get a second hearing: torch draws the scene in bf16, too, and the
  engines pass where their error is at most 1.4 times torch's (3 dB), unless the pictures have little in
  common (`_LEAST_LIKENESS`).

torch draws on the GPU where the engines do, in fp32 without TF32; on the CPU where the engines do, or where the GPU's
memory is too small for fp32, which the reason then says.

A NaN, black or flat picture fails, unless torch draws it black or flat as well: then it is the checkpoint or
the prompt, not the engines, and the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import FidelityRecord, ImageFidelity, Verdict
from sdopt.errors import MissingHardware
from sdopt.fidelity.candidate import find_reference_device
from sdopt.fidelity.drawings import Drawing, draw_isolated
from sdopt.fidelity.metrics import (
    FloatArray,
    PictureFault,
    compute_least_cosine,
    compute_ms_ssim,
    compute_psnr,
    compute_ssim,
    find_fault,
    to_picture,
)
from sdopt.fidelity.scene import DEFAULT_PROMPTS, Scene, write_scene
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme

REFERENCE = TorchSettings()
NOISE_FLOOR = TorchSettings(attention="math")
_TORCH_BF16 = TorchSettings(precision=Precision.BF16)

_FLOOR_MARGIN_DB = 6.0
# Nobody sees more; a 16-bit engine that is closer to torch does not make the budget of a quantised one smaller.
_BEST_PSNR_DB = 50.0
_PEER_MARGIN_DB = 3.0
_TOO_SMALL_GPU = "torch drew on the CPU, because the GPU has too little memory for torch in fp32"


@dataclass(frozen=True)
class Limit:
    """Least PSNR in dB and least SSIM that a picture of the engines must reach."""

    psnr_db: float
    ssim: float

    def below(self, psnr_db: float | None, ssim: float, margin_db: float) -> Limit:
        """This limit, or what is `margin_db` worse than another drawing's figures where that is less.

        SSIM falls with the square of the error: its distance from 1 grows by 10^(margin / 10).
        """
        if psnr_db is None:
            return self
        widened = 1 - (1 - ssim) * 10 ** (margin_db / 10)
        return Limit(min(self.psnr_db, psnr_db - margin_db), max(0.0, min(self.ssim, widened)))

    def holds_for(self, image: ImageFidelity) -> bool:
        return (math.inf if image.psnr_db is None else image.psnr_db) >= self.psnr_db and image.ssim >= self.ssim


LIMITS = {
    Precision.FP32: Limit(50.0, 0.995),
    Precision.FP16: Limit(40.0, 0.98),
    Precision.BF16: Limit(40.0, 0.98),
    # Of bundles whose 16-bit engines are not at hand: the default budget of a quantised one, from 50 dB down.
    Precision.INT8: Limit(30.0, 0.9),
    Precision.FP8: Limit(30.0, 0.9),
}
_LEAST_LIKENESS = Limit(15.0, 0.5)


@dataclass(frozen=True)
class References:
    """What torch draws of a scene, and again for the noise floor. `remark` says why not on the engines' device."""

    scene: Scene
    drawing: Drawing
    floor: Drawing
    device: Literal["cpu", "cuda"]
    remark: str = ""


@dataclass(frozen=True)
class PictureBudget:
    """What quantised engines may lose: dB against the PSNR that 16-bit engines reach, picture by picture, and SSIM."""

    base_psnr_db: tuple[float | None, ...]
    max_psnr_loss_db: float
    min_ssim: float

    def limits(self) -> list[Limit]:
        base = (_BEST_PSNR_DB if psnr_db is None else min(psnr_db, _BEST_PSNR_DB) for psnr_db in self.base_psnr_db)
        return [Limit(psnr_db - self.max_psnr_loss_db, self.min_ssim) for psnr_db in base]


def judge_fidelity(folder: Path, manifest: BundleManifest, work: Path) -> FidelityRecord:
    """Draw with the engines, with torch and with torch again, and judge. `bundle.json` need not be there yet.

    `work` is an existing folder for the inputs and drawings. Raises what the backends raise where a candidate
    cannot be opened or run; a bad picture is a record with the verdict FAIL, not an exception.
    """
    verify = manifest.recipe.verify
    if not verify.enabled:
        return FidelityRecord(verdict=Verdict.NOT_VERIFIED, reason="turned off with --no-verify")
    scene = make_scene(folder, manifest, work)
    engines = draw_engines(folder, manifest, work, scene)
    return hear(folder, manifest, work, draw_references(folder, manifest, work, scene), engines)


def hear(
    folder: Path, manifest: BundleManifest, work: Path, references: References, engines: Drawing
) -> FidelityRecord:
    """Judge what the engines drew, and give 16-bit ones that fail their second hearing."""
    record = judge_engines(manifest, references, engines)
    if record.verdict is Verdict.FAIL and least_precision(manifest) is not Precision.FP32:
        settings = _on(references.device, _TORCH_BF16)
        output = work / "torch-bf16.safetensors"
        label = "torch bf16 (second hearing)"
        peer = draw_isolated(folder, manifest, settings, references.scene, output, label=label)
        record = judge_engines(manifest, references, engines, peer)
    return record


def make_scene(folder: Path, manifest: BundleManifest, work: Path) -> Scene:
    """The scene that the recipe asks for, its inputs written to `work`."""
    verify = manifest.recipe.verify
    scene = Scene(
        prompts=verify.prompts or DEFAULT_PROMPTS, seed=verify.seed, steps=verify.steps,
        guidance_scale=verify.guidance_scale, inputs=work / "inputs.safetensors",
    )  # fmt: skip
    write_scene(folder, manifest, scene)
    return scene


def draw_engines(folder: Path, manifest: BundleManifest, work: Path, scene: Scene) -> Drawing:
    return draw_isolated(folder, manifest, None, scene, work / "engines.safetensors", label="the engines")


def draw_references(folder: Path, manifest: BundleManifest, work: Path, scene: Scene) -> References:
    """Draw with torch fp32, twice: on the GPU where the engines draw there and its memory is large enough."""

    def draw(settings: TorchSettings, name: str, label: str) -> Drawing:
        return draw_isolated(folder, manifest, settings, scene, work / f"{name}.safetensors", label=label)

    def draw_both(device: Literal["cpu", "cuda"], remark: str) -> References:
        reference = draw(_on(device, REFERENCE), "torch", "torch fp32")
        floor = draw(_on(device, NOISE_FLOOR), "noise-floor", "torch fp32 again (noise floor)")
        return References(scene, reference, floor, device, remark)

    device = find_reference_device(manifest)
    try:
        return draw_both(device, "")
    except MissingHardware as error:
        if device == "cpu":
            raise
        return draw_both("cpu", f"; {_TOO_SMALL_GPU} ({error.message})")


def judge_engines(
    manifest: BundleManifest,
    references: References,
    engines: Drawing,
    peer: Drawing | None = None,
    budget: PictureBudget | None = None,
) -> FidelityRecord:
    """Judge what the engines drew; `peer` is what torch draws in bf16, `budget` stands for the limits of `LIMITS`."""
    progress.update("comparing the pictures", 0.0)
    record = judge_drawings(manifest, references.scene, references.drawing, engines, references.floor, peer, budget)
    return record.model_copy(update={"reason": record.reason + references.remark})


def _on(device: Literal["cpu", "cuda"], settings: TorchSettings) -> TorchSettings:
    return settings.model_copy(update={"device": device})


def judge_drawings(
    manifest: BundleManifest,
    scene: Scene,
    reference: Drawing,
    engines: Drawing,
    floor: Drawing,
    peer: Drawing | None = None,
    budget: PictureBudget | None = None,
) -> FidelityRecord:
    """Compare drawings of one scene and judge them. `peer` is what torch draws in bf16."""
    images = compare_drawings(scene, reference, engines, floor)
    heard = () if peer is None else compare_drawings(scene, reference, peer, floor)
    limits = find_limits(images, least_precision(manifest), heard) if budget is None else budget.limits()
    problems = [
        text
        for index, image in enumerate(images)
        if (text := _find_problem(image, limits[index], reference.images[index], engines.images[index]))
    ]
    return FidelityRecord(
        verdict=Verdict.FAIL if problems else Verdict.PASS,
        reason="; ".join(problems) if problems else _explain_pass(images, limits, reference, peer is not None),
        scheduler=reference.scheduler,
        steps=scene.steps,
        guidance_scale=scene.guidance_scale,
        images=images,
    )


def find_limits(
    images: Sequence[ImageFidelity], precision: Precision, peer: Sequence[ImageFidelity] = ()
) -> list[Limit]:
    """What each picture drawn in `precision` has to reach. `peer` are those of torch in bf16, where it was
    heard.
    """
    limits = [LIMITS[precision].below(i.noise_floor_psnr_db, i.noise_floor_ssim, _FLOOR_MARGIN_DB) for i in images]
    if not peer or precision not in (Precision.BF16, Precision.FP16):
        return limits
    return [_hear(limit, image) for limit, image in zip(limits, peer, strict=True)]


def _hear(limit: Limit, peer: ImageFidelity) -> Limit:
    if not peer.ssim:  # NaN, or noise: torch in bf16 does no better, and excuses nothing
        return limit
    lowered = limit.below(peer.psnr_db, peer.ssim, _PEER_MARGIN_DB)
    least = Limit(min(limit.psnr_db, _LEAST_LIKENESS.psnr_db), min(limit.ssim, _LEAST_LIKENESS.ssim))
    return Limit(max(lowered.psnr_db, least.psnr_db), max(lowered.ssim, least.ssim))


def least_precision(manifest: BundleManifest) -> Precision:
    """The coarsest arithmetic among the bundle's engines."""
    kept = {r.quantization.settings.scheme for r in manifest.components.values() if r.quantization and r.is_quantized}
    if kept:
        return Precision.FP8 if kept == {Scheme.FP8} else Precision.INT8
    present = {record.precision for record in manifest.components.values()}
    return next((p for p in (Precision.BF16, Precision.FP16) if p in present), Precision.FP32)


def compare_drawings(
    scene: Scene, reference: Drawing, other: Drawing, floor: Drawing | None = None
) -> tuple[ImageFidelity, ...]:
    """Figures of each picture of `other` against `reference`, beside those of the noise floor.

    A picture with NaN or Inf scores 0 everywhere. Without a floor, its columns say "equal".
    """
    records = []
    for index, prompt in enumerate(scene.prompts):
        psnr_db, ssim = _score(reference, other, index)
        floor_psnr_db, floor_ssim = (None, 1.0) if floor is None else _score(reference, floor, index)
        a, b = to_picture(reference.images[index]), to_picture(other.images[index])
        finite = bool(np.isfinite(other.images[index]).all())
        records.append(
            ImageFidelity(
                prompt=prompt,
                seed=scene.seed_of(index),
                psnr_db=psnr_db,
                ssim=ssim,
                ms_ssim=compute_ms_ssim(a, b) if finite else 0.0,
                latent_cosine_min=compute_least_cosine(reference.latents[index], other.latents[index]),
                noise_floor_psnr_db=floor_psnr_db,
                noise_floor_ssim=floor_ssim,
            )
        )
    return tuple(records)


def _score(reference: Drawing, other: Drawing, index: int) -> tuple[float | None, float]:
    """(PSNR in dB or None for equal pictures, SSIM)."""
    if not np.isfinite(other.images[index]).all():
        return 0.0, 0.0
    a, b = to_picture(reference.images[index]), to_picture(other.images[index])
    psnr_db = compute_psnr(a, b)
    return (None if math.isinf(psnr_db) else psnr_db), compute_ssim(a, b)


def _find_problem(image: ImageFidelity, limit: Limit, by_torch: FloatArray, by_engines: FloatArray) -> str:
    """What is wrong with a picture, as a sentence without its full stop; empty where nothing is."""
    name = f"the picture of {_shorten(image.prompt)!r} (seed {image.seed})"
    fault, fault_of_torch = find_fault(by_engines), find_fault(by_torch)
    if fault_of_torch is PictureFault.NOT_FINITE:
        return f"{name} {fault_of_torch} when torch draws it in fp32: the checkpoint is broken"
    if fault and fault is not fault_of_torch:
        return f"{name} {fault}, and torch draws one"
    if limit.holds_for(image):
        return ""
    return (
        f"{name} differs from torch's: PSNR {format_psnr(image.psnr_db)} (at least {limit.psnr_db:.1f} dB), "
        f"SSIM {image.ssim:.3f} (at least {limit.ssim:.3f}); "
        f"torch against itself has {format_psnr(image.noise_floor_psnr_db)}"
    )


def _explain_pass(images: Sequence[ImageFidelity], limits: Sequence[Limit], reference: Drawing, heard: bool) -> str:
    psnr_db = min(math.inf if i.psnr_db is None else i.psnr_db for i in images)
    floor_db = min(math.inf if i.noise_floor_psnr_db is None else i.noise_floor_psnr_db for i in images)
    least = Limit(min(limit.psnr_db for limit in limits), min(limit.ssim for limit in limits))
    text = (
        f"{len(images)} {'picture' if len(images) == 1 else 'pictures'}: "
        f"PSNR {format_psnr(psnr_db)} or better (limit {least.psnr_db:.1f} dB), "
        f"SSIM {min(i.ssim for i in images):.3f} or better (limit {least.ssim:.3f}); "
        f"torch against itself has {format_psnr(floor_db)}"
    )
    if heard:
        text += "; the limit is that of torch in bf16, which differs as much from fp32"
    if empty := sum(find_fault(image) is not None for image in reference.images):
        text += f"; torch draws {empty} of them black or flat, too: look at the checkpoint and the prompt"
    return text


def format_psnr(psnr_db: float | None) -> str:
    return "∞ dB" if psnr_db is None or math.isinf(psnr_db) else f"{psnr_db:.1f} dB"


def _shorten(prompt: str, limit: int = 60) -> str:
    return prompt if len(prompt) <= limit else prompt[: limit - 1] + "…"
