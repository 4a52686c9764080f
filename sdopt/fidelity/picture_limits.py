"""What a picture of the engines must reach, by their precision and by what torch itself does to the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ImageFidelity
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme

_FLOOR_MARGIN_DB = 6.0


# Nobody sees more; a 16-bit engine that is closer to torch does not make the budget of a quantised one smaller.
_BEST_PSNR_DB = 50.0


_PEER_MARGIN_DB = 3.0


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
class PictureBudget:
    """What quantised engines may lose: dB against the PSNR that 16-bit engines reach, picture by picture, and SSIM."""

    base_psnr_db: tuple[float | None, ...]
    max_psnr_loss_db: float
    min_ssim: float

    def limits(self) -> list[Limit]:
        base = (_BEST_PSNR_DB if psnr_db is None else min(psnr_db, _BEST_PSNR_DB) for psnr_db in self.base_psnr_db)
        return [Limit(psnr_db - self.max_psnr_loss_db, self.min_ssim) for psnr_db in base]


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
