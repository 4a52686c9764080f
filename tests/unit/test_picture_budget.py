"""What pictures of quantised engines may lose, and against which: drawings that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import FidelityRecord, ImageFidelity, Verdict
from sdopt.convert.fidelity import PictureJudge
from sdopt.disk.digest import FileRecord
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store
from sdopt.errors import FidelityError
from sdopt.fidelity import references as references_module
from sdopt.fidelity import verdict as verdict_module
from sdopt.fidelity.compare_drawings import compare_drawings
from sdopt.fidelity.drawings import Drawing
from sdopt.fidelity.picture_limits import LIMITS, PictureBudget
from sdopt.fidelity.references import References
from sdopt.fidelity.scene import Scene
from sdopt.fidelity.verdict import judge_drawings, judge_engines
from sdopt.model.backend_settings import OnnxRuntimeSettings, TorchSettings
from sdopt.model.precision import Precision
from sdopt.model.recipe import VerifySettings
from tests.reference_session import make_bundle

SCENE = Scene(prompts=("a circle", "a star"), seed=7, steps=3, guidance_scale=5, inputs=Path("inputs.safetensors"))


def manifest(precision: Precision = Precision.BF16) -> Any:
    record = SimpleNamespace(precision=precision, backend=OnnxRuntimeSettings(), quantization=None, is_quantized=False)
    return SimpleNamespace(components={"unet": record})


def draw(*noise: float, seed: int = 0) -> Drawing:
    """Two pictures of 64 px; `noise` is the standard deviation of what is added to each, in patches of 8 px."""
    y, x = np.mgrid[0:64, 0:64] / 64
    base = np.stack([0.3 + 0.2 * x, 0.4 + 0.2 * y, 0.5 + 0.0 * x], axis=-1)
    base[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05] = (0.8, 0.2, 0.2)
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(2, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    sizes = np.array(noise or (0.0, 0.0)).reshape(2, 1, 1, 1)
    images = np.clip(np.stack([base, base[::-1, :, ::-1]]) + patches * sizes, 0, 1).astype(np.float32)
    return Drawing(images, np.random.default_rng(99).normal(size=(2, 3, 4, 16, 16)).astype(np.float32), "DDIM")


def figures(drawing: Drawing) -> tuple[ImageFidelity, ...]:
    return compare_drawings(SCENE, draw(), drawing)


def budget_of(base: Drawing, *, loss_db: float = 20.0, min_ssim: float = 0.0) -> PictureBudget:
    return PictureBudget(tuple(image.psnr_db for image in figures(base)), loss_db, min_ssim)


def judge(engines: Drawing, budget: PictureBudget | None, precision: Precision = Precision.BF16) -> FidelityRecord:
    return judge_drawings(manifest(precision), SCENE, draw(), engines, draw(1e-4, 1e-4, seed=5), budget=budget)


psnrs = st.lists(st.one_of(st.none(), st.floats(0, 120)), min_size=1, max_size=4).map(tuple)


@given(psnrs, st.floats(0, 100), st.floats(0, 1))
def test_a_limit_is_so_much_below_the_base_and_no_higher_than_anyone_sees(
    base: Sequence[float | None], loss_db: float, min_ssim: float
) -> None:
    limits = PictureBudget(tuple(base), loss_db, min_ssim).limits()
    assert len(limits) == len(base)
    for psnr_db, limit in zip(base, limits, strict=True):
        assert limit.ssim == min_ssim
        assert limit.psnr_db == pytest.approx(min(50.0 if psnr_db is None else psnr_db, 50.0) - loss_db)


def test_each_picture_has_the_limit_of_its_own_base() -> None:
    base = draw(0.002, 0.05, seed=1)
    better, worse = (image.psnr_db for image in figures(base))
    assert better is not None
    assert worse is not None
    assert better > 50 > worse + 10
    limits = budget_of(base, loss_db=10).limits()
    assert [limit.psnr_db for limit in limits] == [40.0, worse - 10]
    # What the second may lose, the first may not.
    record = judge(draw(0.1, 0.1, seed=2), budget_of(base, loss_db=10))
    assert record.verdict is Verdict.FAIL
    assert "'a circle'" in record.reason
    assert "'a star'" not in record.reason
    assert "at least 40.0 dB" in record.reason


@pytest.mark.parametrize(("margin_db", "verdict"), [(0.01, Verdict.PASS), (-0.01, Verdict.FAIL)])
def test_a_hundredth_of_a_decibel_decides(margin_db: float, verdict: Verdict) -> None:
    engines = draw(0.05, 0.05, seed=2)
    lowest = min(image.psnr_db for image in figures(engines) if image.psnr_db is not None)
    budget = PictureBudget((None, None), 50.0 - lowest + margin_db, 0.0)
    record = judge(engines, budget)
    assert record.verdict is verdict
    if verdict is Verdict.PASS:
        assert f"limit {lowest - margin_db:.1f} dB" in record.reason


def test_ssim_is_a_gate_of_its_own() -> None:
    engines = draw(0.05, 0.05, seed=2)
    least = min(image.ssim for image in figures(engines))
    assert judge(engines, PictureBudget((None, None), 100.0, least - 1e-6)).verdict is Verdict.PASS
    record = judge(engines, PictureBudget((None, None), 100.0, least + 1e-6))
    assert record.verdict is Verdict.FAIL
    assert f"(at least {least:.3f})" in record.reason


def test_a_base_that_is_torchs_own_picture_is_a_base() -> None:
    budget = budget_of(draw(), loss_db=20)
    assert budget.base_psnr_db == (None, None)
    assert [limit.psnr_db for limit in budget.limits()] == [30.0, 30.0]
    assert judge(draw(), budget).verdict is Verdict.PASS
    assert judge(draw(0.02, 0.02, seed=2), budget).verdict is Verdict.PASS
    assert judge(draw(0.02, 0.2, seed=2), budget).verdict is Verdict.FAIL


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
def test_a_budget_stands_for_the_limits_of_16_bits(precision: Precision) -> None:
    engines = draw(0.014, 0.014, seed=2)
    assert all(image.psnr_db < LIMITS[precision].psnr_db for image in figures(engines) if image.psnr_db)
    assert judge(engines, None, precision).verdict is Verdict.FAIL
    assert judge(engines, budget_of(draw()), precision).verdict is Verdict.PASS
    strict = PictureBudget((None, None), 0.0, 0.0)
    nearly = draw(0.006, 0.006, seed=2)
    assert judge(nearly, strict, precision).verdict is Verdict.FAIL, "and a strict one is no laxer than it says"


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (0.0, "is black"), (0.5, "is one flat colour")])
def test_no_budget_is_large_enough_for_what_is_no_picture(value: float, words: str) -> None:
    images = draw().images.copy()
    images[1] = value
    broken = Drawing(images, draw().latents, "DDIM")
    for base in ((None, None), (0.0, 0.0)):  # 0 dB is what NaN of the 16-bit engines scores
        record = judge(broken, PictureBudget(base, 100.0, 0.0))
        assert record.verdict is Verdict.FAIL
        assert words in record.reason
        assert "'a circle'" not in record.reason


def test_why_torch_drew_elsewhere_is_said_of_a_budget_too(tmp_path: Path) -> None:
    references = References(SCENE, draw(), draw(1e-4, 1e-4, seed=5), "cpu", "; torch drew on the CPU")
    for engines in (draw(0.01, 0.01, seed=2), draw(0.3, 0.3, seed=2)):
        record = judge_engines(manifest(), references, engines, budget=budget_of(draw()))
        assert record.reason.endswith("; torch drew on the CPU")


# The judge of one build


class Pictures:
    """Stands for every process that draws: torch's pictures are `draw()`, those of the engines `self.engines`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **verify: Any) -> None:
        self.drawn: list[str] = []
        self.engines = draw()
        for module in (verdict_module, references_module):
            monkeypatch.setattr(module, "draw_isolated", self._draw)
        monkeypatch.setattr(references_module, "draw_twice_isolated", self._draw_twice)
        monkeypatch.setattr(references_module, "write_scene", lambda *arguments: None)
        staging = Staging(tmp_path / "out")
        staging.folder.rmdir()
        made = make_bundle(staging.folder).manifest
        recipe = made.recipe.model_copy(
            update={"verify": VerifySettings(prompts=SCENE.prompts, seed=SCENE.seed, steps=SCENE.steps, **verify)}
        )
        # fp32 has the strictest limits, which a budget stands for.
        self.draft = made.model_copy(update={"recipe": recipe})
        self.judge = PictureJudge(Store(tmp_path / "cache"), staging)

    def _draw(self, folder: Path, manifest: Any, settings: TorchSettings | None, *rest: Any, **more: Any) -> Drawing:
        self.drawn.append("engines" if settings is None else "torch")
        return self.engines if settings is None else draw()

    def _draw_twice(self, *job: Any, **more: Any) -> tuple[Drawing, Drawing]:
        return self._draw(*job), self._draw(*job)

    def verdict_on(self, engines: Drawing, digit: str) -> FidelityRecord:
        """Of a choice of blocks: what tells it from others are its files."""
        self.engines = engines
        files = {"unet/weights.safetensors": FileRecord(sha256=digit * 64, size_bytes=1)}
        return self.judge.judge(self.draft.model_copy(update={"files": files}))


GOOD, QUANTIZED, BAD = draw(0.001, 0.001, seed=2), draw(0.014, 0.014, seed=2), draw(0.3, 0.3, seed=2)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pictures:
    return Pictures(monkeypatch, tmp_path)


def test_torch_and_the_16_bit_engines_draw_once_for_every_choice(pictures: Pictures) -> None:
    pictures.engines = GOOD
    pictures.judge.set_base(pictures.draft)
    assert sorted(pictures.drawn) == ["engines", "torch", "torch"]
    pictures.drawn.clear()
    assert pictures.verdict_on(QUANTIZED, "a").verdict is Verdict.PASS
    assert pictures.verdict_on(BAD, "b").verdict is Verdict.FAIL
    assert pictures.drawn == ["engines", "engines"]


def test_a_choice_that_passed_is_not_drawn_again_and_one_that_failed_is(pictures: Pictures) -> None:
    pictures.engines = GOOD
    pictures.judge.set_base(pictures.draft)
    pictures.drawn.clear()
    for _ in range(2):
        pictures.verdict_on(QUANTIZED, "a")
        pictures.verdict_on(BAD, "b")
    assert pictures.drawn == ["engines"] * 3


@pytest.mark.parametrize("verify", [{"max_psnr_loss": 3.0}, {"min_ssim": 0.999}])
def test_the_budget_is_the_recipes(verify: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = Pictures(monkeypatch, tmp_path, **verify)
    pictures.engines = GOOD
    pictures.judge.set_base(pictures.draft)
    assert pictures.verdict_on(QUANTIZED, "a").verdict is Verdict.FAIL


def test_where_nothing_is_quantised_after_all_no_budget_counts(pictures: Pictures) -> None:
    pictures.engines = GOOD
    pictures.judge.set_base(pictures.draft)
    assert pictures.verdict_on(QUANTIZED, "a").verdict is Verdict.PASS, "within the budget"
    pictures.judge.drop_base()
    assert pictures.verdict_on(QUANTIZED, "b").verdict is Verdict.FAIL, "and no engine of 16 bits may draw so"


def test_16_bit_engines_that_fail_are_no_base(pictures: Pictures) -> None:
    pictures.engines = QUANTIZED
    with pytest.raises(FidelityError, match="do not draw what torch draws"):
        pictures.judge.set_base(pictures.draft)


def test_a_verdict_of_another_budget_is_not_taken_from_the_store(pictures: Pictures) -> None:
    pictures.engines = GOOD
    pictures.judge.set_base(pictures.draft)
    assert pictures.verdict_on(QUANTIZED, "a").verdict is Verdict.PASS
    verify = pictures.draft.recipe.verify.model_copy(update={"max_psnr_loss": 1.0})
    recipe = pictures.draft.recipe.model_copy(update={"verify": verify})
    stricter: BundleManifest = pictures.draft.model_copy(update={"recipe": recipe})
    pictures.draft, pictures.engines = stricter, GOOD
    pictures.judge.set_base(stricter)
    assert pictures.verdict_on(QUANTIZED, "a").verdict is Verdict.FAIL
