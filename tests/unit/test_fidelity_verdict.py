"""The verdict on planted drawings: what must pass, and what must be caught."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdopt.backends.protocol import Probe
from sdopt.bundle.records import FidelityRecord, Verdict
from sdopt.errors import MissingHardware
from sdopt.fidelity import candidate as candidate_module
from sdopt.fidelity import references as references_module
from sdopt.fidelity import verdict as verdict_module
from sdopt.fidelity.compare_drawings import compare_drawings
from sdopt.fidelity.drawings import Drawing, read_drawing, write_drawing
from sdopt.fidelity.picture_limits import LIMITS, Limit
from sdopt.fidelity.scene import Scene
from sdopt.fidelity.verdict import judge_drawings, judge_fidelity
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, TensorRTSettings, TorchSettings
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe, VerifySettings

CPU, GPU = OnnxRuntimeSettings(), TensorRTSettings(kind="tensorrt-rtx")
SCENE = Scene(prompts=("a circle", "a star"), seed=7, steps=3, guidance_scale=5, inputs=Path("inputs.safetensors"))


def manifest(*precisions: Precision, verify: VerifySettings | None = None, backend: BackendSettings = CPU) -> Any:
    records = {
        str(i): SimpleNamespace(precision=each, backend=backend, quantization=None, is_quantized=False)
        for i, each in enumerate(precisions)
    }
    return SimpleNamespace(components=records, recipe=BuildRecipe(verify=verify or VerifySettings()))


def draw(noise: float = 0.0, seed: int = 0) -> Drawing:
    """Two pictures of 64 px; `noise` is the standard deviation of what is added to them, in patches of
    8 px as drifting latents do, and to the latents."""
    y, x = np.mgrid[0:64, 0:64] / 64
    base = np.stack([0.3 + 0.2 * x, 0.4 + 0.2 * y, 0.5 + 0.0 * x], axis=-1)
    base[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05] = (0.8, 0.2, 0.2)
    images = np.stack([base, base[::-1, :, ::-1]])
    latents = np.random.default_rng(99).normal(size=(2, 3, 4, 16, 16))
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(2, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    images = np.clip(images + patches * noise, 0, 1)
    latents = latents + rng.normal(size=latents.shape) * noise
    return Drawing(images.astype(np.float32), latents.astype(np.float32), "DDIM")


def replace(drawing: Drawing, value: object) -> Drawing:
    """The drawing with its second picture all of one value."""
    images = drawing.images.copy()
    images[1] = value
    return Drawing(images, drawing.latents, drawing.scheduler)


def judge(
    engines: Drawing,
    *,
    precision: Precision = Precision.FP32,
    reference: Drawing | None = None,
    floor: float = 1e-4,
) -> FidelityRecord:
    return judge_drawings(manifest(precision), SCENE, reference or draw(), engines, draw(floor, seed=5))


def test_equal_pictures_pass() -> None:
    record = judge(draw(), floor=0)
    assert record.verdict is Verdict.PASS
    assert [image.psnr_db for image in record.images] == [None, None]
    assert [image.seed for image in record.images] == [7, 8]
    assert record.scheduler == "DDIM"
    assert FidelityRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("precision", "noise"), [(Precision.FP32, 0.002), (Precision.FP16, 0.006), (Precision.BF16, 0.006)]
)
def test_drift_within_the_precision_passes_and_beyond_it_fails(precision: Precision, noise: float) -> None:
    assert judge(draw(noise, 1), precision=precision).verdict is Verdict.PASS
    failed = judge(draw(noise * 20, 1), precision=precision)
    assert failed.verdict is Verdict.FAIL
    assert "differs from torch's" in failed.reason
    assert "PSNR" in failed.reason


def test_coarser_precision_has_a_lower_limit() -> None:
    assert judge(draw(0.006, 1), precision=Precision.BF16).verdict is Verdict.PASS
    assert judge(draw(0.006, 1), precision=Precision.FP32).verdict is Verdict.FAIL


def test_the_least_precise_engine_sets_the_limit() -> None:
    mixed = manifest(Precision.FP32, Precision.BF16, Precision.FP16)
    assert judge_drawings(mixed, SCENE, draw(), draw(0.006, 1), draw()).verdict is Verdict.PASS


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (0.0, "is black"), (0.5, "is one flat colour")])
def test_a_picture_that_is_none_fails(value: float, words: str) -> None:
    record = judge(replace(draw(), value), precision=Precision.BF16)
    assert record.verdict is Verdict.FAIL
    assert words in record.reason
    assert "'a star'" in record.reason
    assert "'a circle'" not in record.reason
    assert FidelityRecord.model_validate_json(record.model_dump_json()) == record


def test_nan_scores_zero() -> None:
    image = compare_drawings(SCENE, draw(), replace(draw(), np.nan), draw())[1]
    assert (image.psnr_db, image.ssim, image.ms_ssim) == (0.0, 0.0, 0.0)


def test_a_flat_picture_that_torch_draws_too_is_not_the_engines_fault() -> None:
    record = judge(replace(draw(), 0.5), reference=replace(draw(), 0.5))
    assert record.verdict is Verdict.PASS
    assert "torch draws 1 of them black or flat, too" in record.reason


def test_nan_by_torch_itself_fails_and_names_the_checkpoint() -> None:
    record = judge(replace(draw(), np.nan), reference=replace(draw(), np.nan))
    assert record.verdict is Verdict.FAIL
    assert "the checkpoint is broken" in record.reason


def test_the_noise_floor_lowers_the_limit_where_torch_is_as_far_from_itself() -> None:
    engines = draw(0.006, 1)
    assert judge(engines, floor=1e-4).verdict is Verdict.FAIL
    assert judge(engines, floor=0.006).verdict is Verdict.PASS
    assert judge(draw(0.03, 1), floor=0.006).verdict is Verdict.FAIL


def test_a_limit_is_only_ever_lowered_by_another_drawing() -> None:
    limit = LIMITS[Precision.BF16]
    assert limit.below(None, 1.0, 6) == limit
    assert limit.below(90.0, 0.99999, 6) == limit
    assert limit.below(20.0, 0.8, 6) == Limit(14.0, pytest.approx(1 - 0.2 * 10**0.6))


class FakeDraws:
    """Stands in for the child processes: one planted drawing for each candidate, and too little memory for one."""

    def __init__(self, engines: Drawing, bf16: Drawing, too_large: TorchSettings | None = None) -> None:
        self._engines, self._bf16, self._too_large = engines, bf16, too_large
        self.drawn: list[TorchSettings | None] = []

    def __call__(
        self, folder: Path, manifest: Any, settings: TorchSettings | None, *args: Any, **kwargs: Any
    ) -> Drawing:
        self.drawn.append(settings)
        if settings is None:
            return self._engines
        if settings == self._too_large:
            raise MissingHardware("it ran out of memory")
        return self._bf16 if settings.precision is Precision.BF16 else draw()

    def twice(
        self, folder: Path, manifest: Any, settings: TorchSettings, *args: Any, **kwargs: Any
    ) -> tuple[Drawing, Drawing]:
        again = settings.model_copy(update={"attention": "math"})
        return self(folder, manifest, settings), self(folder, manifest, again)


def judge_fakes(
    monkeypatch: pytest.MonkeyPatch, engines: Drawing, bf16: Drawing, precision: Precision,
    backend: BackendSettings = CPU, too_large: TorchSettings | None = None,
) -> tuple[FidelityRecord, FakeDraws]:  # fmt: skip
    fakes = FakeDraws(engines, bf16, too_large)
    for module in (verdict_module, references_module):
        monkeypatch.setattr(module, "draw_isolated", fakes)
    monkeypatch.setattr(references_module, "draw_twice_isolated", fakes.twice)
    monkeypatch.setattr(references_module, "write_scene", lambda *args: None)
    verify = VerifySettings(prompts=SCENE.prompts, steps=3)
    judged = manifest(precision, verify=verify, backend=backend)
    return judge_fidelity(Path("bundle"), judged, Path("work")), fakes


def give_gpu(monkeypatch: pytest.MonkeyPatch, missing: str = "") -> None:
    monkeypatch.setattr(candidate_module, "probe_backend", lambda settings: Probe("torch", "", (), missing))


def test_torch_draws_on_the_gpu_that_the_engines_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)
    record, fakes = judge_fakes(monkeypatch, draw(0.07, 1), draw(0.07, 2), Precision.FP16, GPU)
    assert "on the CPU" not in record.reason
    assert fakes.drawn == [
        None, TorchSettings(device="cuda"), TorchSettings(device="cuda", attention="math"),
        TorchSettings(device="cuda", precision=Precision.BF16),
    ]  # fmt: skip


@pytest.mark.parametrize(("backend", "missing"), [(CPU, ""), (GPU, "no NVIDIA GPU")])
def test_torch_draws_on_the_cpu_elsewhere(
    backend: BackendSettings, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_gpu(monkeypatch, missing)
    _, fakes = judge_fakes(monkeypatch, draw(0.07, 1), draw(0.07, 2), Precision.FP16, backend)
    assert [settings.device for settings in fakes.drawn if settings] == ["cpu"] * 3


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_a_gpu_too_small_for_fp32_leaves_torch_to_the_cpu(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)
    too_large = TorchSettings(device="cuda", attention=attention)
    record, fakes = judge_fakes(monkeypatch, draw(), draw(), Precision.FP16, GPU, too_large)
    assert record.verdict is Verdict.PASS
    assert fakes.drawn[-2:] == [TorchSettings(), TorchSettings(attention="math")]
    assert "torch drew on the CPU, because the GPU has too little memory" in record.reason
    assert "(it ran out of memory)" in record.reason
    with pytest.raises(MissingHardware):
        judge_fakes(monkeypatch, draw(), draw(), Precision.FP16, CPU, TorchSettings(attention=attention))


def test_a_picture_that_fails_beside_torch_on_the_cpu_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)
    too_large = TorchSettings(device="cuda")
    record, fakes = judge_fakes(monkeypatch, draw(0.6, 1), draw(0.6, 2), Precision.FP16, GPU, too_large)
    assert record.verdict is Verdict.FAIL
    assert "differs from torch's" in record.reason
    assert "torch drew on the CPU, because the GPU has too little memory" in record.reason
    assert fakes.drawn[-1] == TorchSettings(precision=Precision.BF16)


def test_bf16_that_fails_is_heard_again_beside_torch_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    record, fakes = judge_fakes(monkeypatch, draw(0.07, 1), draw(0.07, 2), Precision.BF16)
    assert record.verdict is Verdict.PASS
    assert "torch in bf16" in record.reason
    assert fakes.drawn[-1] == TorchSettings(precision=Precision.BF16)


def test_bf16_worse_than_torch_in_bf16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = judge_fakes(monkeypatch, draw(0.14, 1), draw(0.05, 2), Precision.BF16)
    assert record.verdict is Verdict.FAIL


def test_bf16_with_nothing_in_common_fails_whatever_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = judge_fakes(monkeypatch, draw(0.6, 1), draw(0.6, 2), Precision.BF16)
    assert record.verdict is Verdict.FAIL


def test_torch_in_bf16_that_draws_nan_excuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = judge_fakes(monkeypatch, draw(0.07, 1), replace(draw(), np.nan), Precision.BF16)
    assert record.verdict is Verdict.FAIL


def test_fp32_that_fails_gets_no_second_hearing(monkeypatch: pytest.MonkeyPatch) -> None:
    record, fakes = judge_fakes(monkeypatch, draw(0.07, 1), draw(0.07, 2), Precision.FP32)
    assert record.verdict is Verdict.FAIL
    assert len(fakes.drawn) == 3


def test_switched_off_is_recorded_as_not_verified() -> None:
    off = manifest(Precision.FP32, verify=VerifySettings(enabled=False))
    assert judge_fidelity(Path("bundle"), off, Path("work")).verdict is Verdict.NOT_VERIFIED


def test_a_drawing_survives_the_file(tmp_path: Path) -> None:
    drawing = draw(0.1)
    write_drawing(drawing, tmp_path / "d.safetensors")
    again = read_drawing(tmp_path / "d.safetensors")
    assert again.scheduler == "DDIM"
    assert (again.images == drawing.images).all()
    assert (again.latents == drawing.latents).all()
