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
* bf16 and fp16 that miss their limit are judged a second time: torch draws the scene in bf16 as well, and the
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
from pathlib import Path

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import FidelityRecord, ImageFidelity, Verdict
from sdopt.fidelity.compare_drawings import compare_apart, format_psnr
from sdopt.fidelity.drawings import Drawing, draw_isolated
from sdopt.fidelity.metrics import (
    FloatArray,
    PictureFault,
    find_fault,
)
from sdopt.fidelity.picture_limits import Limit, PictureBudget, find_limits, least_precision
from sdopt.fidelity.references import References, draw_engines, draw_references, make_scene, on_device
from sdopt.fidelity.scene import Scene
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.precision import Precision

_TORCH_BF16 = TorchSettings(precision=Precision.BF16)


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
    return judge_with_bf16_reference(folder, manifest, work, draw_references(folder, manifest, work, scene), engines)


def judge_with_bf16_reference(
    folder: Path, manifest: BundleManifest, work: Path, references: References, engines: Drawing
) -> FidelityRecord:
    """Judge the pictures. 16-bit engines that fail are judged again by the limits of torch in bf16."""
    record = judge_engines(manifest, references, engines)
    if record.verdict is Verdict.FAIL and least_precision(manifest) is not Precision.FP32:
        settings = on_device(references.device, _TORCH_BF16)
        output = work / "torch-bf16.safetensors"
        label = "torch bf16 (16-bit limits)"
        peer = draw_isolated(folder, manifest, settings, references.scene, output, label=label)
        record = judge_engines(manifest, references, engines, peer)
    return record


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
    images = compare_apart(scene, reference, engines, floor)
    heard = () if peer is None else compare_apart(scene, reference, peer, floor)
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


def _shorten(prompt: str, limit: int = 60) -> str:
    return prompt if len(prompt) <= limit else prompt[: limit - 1] + "…"
