"""GPU generations that have no such quantised type are refused by name, before any work."""

from __future__ import annotations

import dataclasses

import pytest

from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.plan import BuildPlan, resolve_build
from sdopt.convert.plans import wanted
from sdopt.convert.plans.wanted import require_types, requires_fused
from sdopt.errors import MissingHardware, RecipeError
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.quantization import ComponentQuantization, QuantizationSettings, Scheme
from sdopt.model.recipe import BuildRecipe
from sdopt.model.target import Runtime, Target, parse_target
from tests.conftest import TINY_SHAPES
from tests.planted_plans import make_machine


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    return resolve_build(open_checkpoint(str(TINY_SHAPES)), BuildRecipe(source=str(TINY_SHAPES)))


def ask(plan: BuildPlan, target: Target, scheme: Scheme, component: ComponentName = ComponentName.UNET) -> BuildPlan:
    settings = QuantizationSettings(components={component: ComponentQuantization(scheme=scheme)})
    recipe = plan.recipe.model_copy(update={"target": target})
    return dataclasses.replace(plan, recipe=recipe, quantization=settings)


@pytest.mark.parametrize(
    ("scheme", "target", "named"),
    [
        (Scheme.FP8, "rtx:sm86", "sm86 has no FP8: FP8 needs sm89 and later"),
        (Scheme.FP8, "rtx:sm89,sm75", "sm75 has no FP8"),
        (Scheme.FP8, "rtx:sm80", "sm80 has no FP8"),
        (Scheme.FP8, "rtx", "a plan for Ampere and all later has no FP8: FP8 needs sm89 and later"),
        (Scheme.INT4_WEIGHTS, "rtx:sm75", "sm75 has no INT4: INT4 needs sm80 and later"),
    ],
)
def test_a_generation_without_the_type_is_refused_by_name(
    plan: BuildPlan, scheme: Scheme, target: str, named: str
) -> None:
    with pytest.raises(RecipeError, match=named) as caught:
        require_types(ask(plan, parse_target(target), scheme))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        (Scheme.FP8, "rtx:sm89,sm120,sm121"), (Scheme.INT8, "rtx:sm75"), (Scheme.INT8, "rtx"),
        (Scheme.INT8_WEIGHTS, "rtx:sm75"), (Scheme.INT4_WEIGHTS, "rtx:sm80"), (Scheme.INT4_WEIGHTS, "rtx"),
    ],
)  # fmt: skip
def test_a_generation_with_the_type_passes(plan: BuildPlan, scheme: Scheme, target: str) -> None:
    require_types(ask(plan, parse_target(target), scheme))


def test_precision_alone_asks_for_fp8(plan: BuildPlan) -> None:
    recipe = plan.recipe.model_copy(update={"target": parse_target("rtx:sm86"), "precision": Precision.FP8})
    with pytest.raises(RecipeError, match="sm86 has no FP8"):
        require_types(dataclasses.replace(plan, recipe=recipe))


def test_what_no_component_of_the_model_has_is_not_asked_for(plan: BuildPlan) -> None:
    asked = ask(plan, parse_target("rtx:sm75"), Scheme.INT4_WEIGHTS, ComponentName.TEXT_ENCODER_2)
    assert ComponentName.TEXT_ENCODER_2 not in asked.components
    require_types(asked)


def test_the_gpu_of_this_machine_is_hardware(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "find_gpus", lambda: make_machine("sm86").gpus)
    with pytest.raises(MissingHardware, match="sm86 has no FP8"):
        require_types(ask(plan, Target(Runtime.TENSORRT), Scheme.FP8))
    require_types(ask(plan, Target(Runtime.TENSORRT), Scheme.INT8))


def test_fused_attention_is_insisted_on_where_a_kernel_can_be_had(plan: BuildPlan) -> None:
    """The VAE's one head of 512 numbers has none in TensorRT-RTX 1.7."""
    insisting = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"require_fused": True}))
    assert {name for name in ComponentName if requires_fused(insisting, name)} == {
        ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2, ComponentName.UNET
    }  # fmt: skip
    assert not any(requires_fused(plan, name) for name in ComponentName)
