"""`--dry-run`: the estimates of the stages that convert runs, with INT8's, and figures that grow with the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sdopt.checkpoint.source import open_checkpoint
from sdopt.cli.text import format_duration, format_megabytes
from sdopt.convert.build import Build
from sdopt.convert.convert import list_steps
from sdopt.convert.cost import PROCESS_BYTES, cost_of
from sdopt.convert.plan import BuildPlan, resolve_build
from sdopt.convert.stages import STAGES
from sdopt.disk.store import Store
from sdopt.errors import UsageError
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import parse_recipe
from tests.conftest import TINY_SHAPES

ALWAYS = {"weights", "graph", "parity", "words", "fidelity"}
OF_INT8 = {"trajectories", "calibration", "trials", "pictures"}


def plan_of(size: str, precision: Precision = Precision.FP32, **values: object) -> BuildPlan:
    recipe = parse_recipe({"source": str(TINY_SHAPES), "size": size, "precision": precision, **values}, where="a test")
    return resolve_build(open_checkpoint(str(TINY_SHAPES)), recipe)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_memory_and_time_grow_with_the_picture(precision: Precision, tmp_path: Path) -> None:
    small, large = (list_steps(plan_of(size, precision), tmp_path / "out") for size in ("512x512", "2048x2048"))
    assert [(step.stage, step.component) for step in small] == [(step.stage, step.component) for step in large]
    assert {step.stage for step in small} == (ALWAYS | OF_INT8 if precision is Precision.INT8 else ALWAYS)
    for before, after in zip(small, large, strict=True):
        if before.stage in ("weights", "graph") or before.component == ComponentName.TEXT_ENCODER:
            assert after.memory_bytes == before.memory_bytes
        else:
            # Sixteen times the pixels; the weights do not grow, and attention grows with the square.
            assert after.memory_bytes - PROCESS_BYTES > 4 * (before.memory_bytes - PROCESS_BYTES), before.stage
            assert after.expected_s > 10 * before.expected_s, before.stage


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "<1 second"), (1.2, "1 second"), (40, "40 seconds"), (119, "119 seconds"), (720, "12 minutes"),
        (7200, "2 hours"), (4 * 86_400, "4 days"), (38_591_484_013, "1,223 years"),
    ],
)  # fmt: skip
def test_a_duration_is_told_in_a_unit_that_fits(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "\N{EN DASH}"), (40_000, "<1"), (600_000, "1"), (1_234_567_890, "1,235")]
)
def test_megabytes_are_whole_and_what_is_there_is_not_none(size_bytes: int, text: str) -> None:
    assert format_megabytes(size_bytes) == text


def test_a_build_that_is_not_verified_has_no_step_of_the_verdict(tmp_path: Path) -> None:
    plan = plan_of("64x64", Precision.INT8, verify={"enabled": False})
    found = {step.stage for step in list_steps(plan, tmp_path / "out")}
    assert found == {"weights", "graph", "trajectories", "calibration", "trials", "words"}


def test_the_dry_run_is_the_list_of_stages_and_writes_nothing(tmp_path: Path) -> None:
    plan = plan_of("64x64", Precision.INT8)
    steps = list_steps(plan, tmp_path / "out")
    build = Build(plan, tmp_path / "out", Store(), tmp_path)
    assert steps == [step for stage in STAGES for step in stage.estimate(build)]
    names = [stage.name for stage in STAGES]
    assert names == [
        "weights and graphs",
        "small files",
        "parity",
        "quantise",
        "slots",
        "plans",
        "fidelity",
        "card",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_convolution_counts_each_weight_at_each_position() -> None:
    """By hand for the first layer of the UNet: two operations for each weight and latent position, drawn twice."""
    plan = plan_of("64x64")
    unet = plan.components[ComponentName.UNET]
    only = {name: ref for name, ref in unet.tensors.items() if name == "conv_in.weight"}
    (ref,) = only.values()
    out_channels, in_channels, height, width = ref.shape
    components = {**plan.components, ComponentName.UNET: dataclasses.replace(unet, tensors=only)}
    cost = cost_of(dataclasses.replace(plan, components=components), ComponentName.UNET)
    factor = 2 ** (len(plan.components[ComponentName.VAE_DECODER].config["block_out_channels"]) - 1)
    latents = (64 // factor) ** 2
    assert cost.flops == 2 * 2 * out_channels * in_channels * height * width * latents
    assert cost.activation_bytes == 4 * 2 * 4 * out_channels * latents
    assert cost.fp32_bytes == 4 * out_channels * in_channels * height * width


def test_a_bundle_in_its_own_checkpoint_is_refused_before_any_work(tmp_path: Path) -> None:
    plan = plan_of("64x64")
    with pytest.raises(UsageError, match="lies inside the checkpoint") as caught:
        list_steps(plan, TINY_SHAPES / "bundle")
    assert list_steps(plan, Path(caught.value.hint.split("-o ")[1])), "the hint is a place that is accepted"
