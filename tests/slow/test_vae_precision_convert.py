"""A VAE that fp16 cannot hold, through convert: the safe precision is chosen, proven, and said with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.bundle.records import Verdict
from sdopt.convert.convert import convert, list_steps
from sdopt.convert.decide import open_plan
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe, VerifySettings
from sdopt.model.target import parse_target
from tests.planted_overflow import DECODER_LAYER, plant_overflow

DECODER, UNET = ComponentName.VAE_DECODER, ComponentName.UNET


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> BuildRecipe:
    source = plant_overflow(tmp_path_factory.mktemp("planted") / "model")
    return BuildRecipe(
        source=str(source), target=parse_target("onnxruntime"), precision=Precision.FP16,
        verify=VerifySettings(steps=2, prompts=("a small green star",)),
    )  # fmt: skip


def test_the_vae_is_kept_from_fp16_and_the_bundle_says_why(recipe: BuildRecipe, tmp_path: Path) -> None:
    plan = open_plan(recipe)
    notes = {step.component: step.note for step in list_steps(plan, tmp_path / "b") if step.note}
    manifest = convert(plan, tmp_path / "b")
    record = manifest.components[DECODER]
    assert (record.precision, manifest.components[UNET].precision) == (Precision.FP32, Precision.FP16)
    assert DECODER_LAYER in record.precision_reason
    assert notes[DECODER] == f"fp32, {record.precision_reason}"
    assert record.precision_reason in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert manifest.recipe.precision is Precision.FP16
    assert manifest.fidelity.verdict is Verdict.PASS
    assert convert(open_plan(recipe), tmp_path / "b") == manifest, "the same choice again: nothing is built"


def test_no_proof_on_a_cpu_sees_the_overflow_that_a_fixed_fp16_is_warned_of(
    recipe: BuildRecipe, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU kernels hand an fp16 graph's values on in fp32: the measurement alone stands before a GPU."""
    fixed = recipe.model_copy(update={"component_precision": {DECODER: Precision.FP16}})
    manifest = convert(open_plan(fixed), tmp_path / "b")
    record = manifest.components[DECODER]
    assert record.precision is Precision.FP16
    assert "fixed by the recipe, which could overflow" in record.precision_reason
    assert record.parity is not None
    assert record.parity.passed
    assert manifest.fidelity.verdict is Verdict.PASS


@pytest.mark.parametrize("precision", [Precision.AUTO, Precision.BF16])
def test_a_bf16_graph_for_tensorrt_is_proven_on_a_cpu(
    recipe: BuildRecipe, precision: Precision, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    ours = recipe.model_copy(
        update={
            "target": parse_target("rtx:sm89"), "precision": precision,
            "verify": VerifySettings(fidelity=False),
        }
    )  # fmt: skip
    manifest = convert(open_plan(ours), tmp_path / "b")
    record = manifest.components[DECODER]
    assert record.precision is Precision.BF16
    assert record.parity is not None
    assert (record.parity.passed, record.parity.runtime) == (True, "openvino")
    unet = manifest.components[UNET].parity
    assert unet is not None
    assert unet.runtime == ("onnxruntime" if precision is Precision.AUTO else "openvino")
