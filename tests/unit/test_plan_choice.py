"""Which plan runs where, as a question to data: no GPU, no TensorRT, no file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import PlanRecord
from sdopt.errors import EnvironmentMissingError, MissingDependency, MissingHardware
from sdopt.machine.environment import Machine
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe
from sdopt.model.target import PORTABLE, parse_target
from sdopt.preflight.plan_choice import PlanChoice, choose_plans
from tests.planted_plans import make_machine, make_plan, with_plans
from tests.reference_session import make_bundle

FOLDER = Path("engines/mine")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> BundleManifest:
    manifest = make_bundle(tmp_path_factory.mktemp("bundle") / "b").manifest
    recipe = BuildRecipe(source="a b.safetensors", target=parse_target("rtx:sm86,sm120"), precision=Precision.FP16)
    return manifest.model_copy(update={"recipe": recipe})


def choose(manifest: BundleManifest, plans: list[PlanRecord], machine: Machine) -> PlanChoice:
    return choose_plans(FOLDER, with_plans(manifest, {ComponentName.UNET: plans}), machine)


def refused(manifest: BundleManifest, plans: list[PlanRecord], machine: Machine) -> EnvironmentMissingError:
    with pytest.raises(EnvironmentMissingError) as caught:
        choose(manifest, plans, machine)
    return caught.value


@pytest.mark.parametrize(
    ("offered", "here", "taken"),
    [
        (["sm86", "sm89", "ampere+"], "sm89", "sm89"),
        (["ampere+", "sm89"], "sm89", "sm89"),
        (["ampere+", "sm86"], "sm89", "ampere+"),
        (["ampere+"], "sm80", "ampere+"),
        (["ampere+"], "sm120", "ampere+"),
        (["ampere+"], "sm130", "ampere+"),
        (["sm75", "ampere+"], "sm75", "sm75"),
    ],
)
def test_the_exact_generation_before_the_portable_plan(
    offered: list[str], here: str, taken: str, plain: BundleManifest
) -> None:
    chosen = choose(plain, [make_plan(generation) for generation in offered], make_machine(here))
    assert [plan.generation for plan in chosen[ComponentName.UNET]] == [taken]


@pytest.mark.parametrize(
    ("offered", "here"),
    [("sm86", "sm89"), ("sm80", "sm86"), ("sm89", "sm86"), ("ampere+", "sm75"), ("sm120", "sm121")],
)
def test_a_named_generation_runs_on_no_other(offered: str, here: str, plain: BundleManifest) -> None:
    assert f"there are plans for {offered}, and" in refused(plain, [make_plan(offered)], make_machine(here)).message


def test_one_plan_for_each_profile(plain: BundleManifest) -> None:
    plans = [make_plan(generation, profile=profile) for profile in (0, 1) for generation in ("ampere+", "sm89")]
    chosen = choose(plain, plans, make_machine())[ComponentName.UNET]
    assert [(plan.profile, plan.generation) for plan in chosen] == [(0, "sm89"), (1, "sm89")]
    half = [make_plan("sm89", profile=0), make_plan("sm86", profile=1)]
    assert "sm86" in refused(plain, half, make_machine()).message


def test_a_bundle_without_plans_asks_nothing(plain: BundleManifest) -> None:
    assert choose_plans(FOLDER, plain, make_machine(None, version=None)) == {}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, type[EnvironmentMissingError]]] = {
    "another system": (
        {"system": "Windows AMD64"}, {}, "built for Windows AMD64, and this is Linux x86_64", "sdopt convert",
        MissingHardware,
    ),
    "another architecture": ({"system": "Linux aarch64"}, {}, "Linux aarch64", "sdopt convert", MissingHardware),
    "no GPU": ({}, {"generation": None}, "this machine shows none", "sdopt convert --again engines/mine "
               "-o engines/mine-cpu --target cpu --precision auto", MissingHardware),
    "no library": (
        {}, {"version": None}, "tensorrt-rtx is not installed",
        "pip install 'sdopt[rtx]' 'tensorrt-rtx==1.7.1.116'", MissingDependency,
    ),
    "newer library": (
        {}, {"version": "1.8.0.33"}, "of tensorrt-rtx 1.7.1.116, and 1.8.0.33 is installed",
        "pip install 'tensorrt-rtx==1.7.1.116'", MissingDependency,
    ),
    "another build of the library": ({"version": "1.7.1.117"}, {}, "1.7.1.117", "pip install", MissingDependency),
    "old driver": ({}, {"driver": "570.86.10"}, "driver is 570.86.10", "install driver 580", MissingHardware),
    "too little memory": (
        {"plan_bytes": 30 << 30}, {}, "about 33.3 GB of the GPU's memory, by an estimate", "engines/mine-cpu",
        MissingHardware,
    ),
    "memory in use": (
        {"plan_bytes": 10 << 30}, {"free_bytes": 5 << 30}, "has 5.4 GB free", "nvidia-smi", MissingHardware
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_reason_is_one_sentence_with_the_command_that_mends_it(name: str, plain: BundleManifest) -> None:
    plan, machine, said, hint, kind = REFUSED[name]
    error = refused(plain, [make_plan(**plan)], make_machine(**machine))
    assert said in error.message
    assert ";" not in error.message
    assert error.hint.startswith(hint) or hint in error.hint
    assert type(error) is kind


def test_the_rebuild_keeps_what_the_bundle_has(plain: BundleManifest) -> None:
    error = refused(plain, [make_plan("sm86"), make_plan("sm120")], make_machine("sm89"))
    assert error.message == "there are plans for sm86 and sm120, and the NVIDIA GeForce RTX 4090 here is sm89"
    assert error.hint == "sdopt convert --again engines/mine --target rtx:sm86,sm89,sm120"


@pytest.mark.parametrize("offered", ["sm86", "ampere+"])
@pytest.mark.parametrize("here", ["sm70", "sm87", "sm90", "sm100", "sm103", "sm110"])
def test_a_gpu_that_rtx_refuses_gets_another_runtime(offered: str, here: str, plain: BundleManifest) -> None:
    error = refused(plain, [make_plan(offered)], make_machine(here))
    assert error.message.endswith(f"is {here}")
    assert error.hint == "sdopt convert --again engines/mine --target cuda"


def test_where_rtx_runs_nothing_a_recipe_that_onnxruntime_cannot_compute_gets_tensorrt(plain: BundleManifest) -> None:
    hint = "sdopt convert --again engines/mine --target tensorrt"
    for changes in ({"precision": Precision.INT8}, {"component_precision": {ComponentName.UNET: Precision.BF16}}):
        manifest = plain.model_copy(update={"recipe": plain.recipe.model_copy(update=changes)})
        assert refused(manifest, [make_plan(PORTABLE)], make_machine("sm90")).hint == hint
    machine = make_machine("sm90")
    installed = {**machine.libraries, "tensorrt": machine.libraries["tensorrt-rtx"]}
    assert refused(plain, [make_plan(PORTABLE)], replace(machine, libraries=installed)).hint == hint


def test_a_gpu_of_a_later_generation_than_rtx_names_is_sent_to_the_portable_plan(plain: BundleManifest) -> None:
    hint = refused(plain, [make_plan("sm89")], make_machine("sm130")).hint
    assert hint == "sdopt convert --again engines/mine --target rtx"


def test_a_gpu_without_fp8_is_not_sent_to_a_build_that_refuses_it(plain: BundleManifest) -> None:
    recipe = plain.recipe.model_copy(update={"precision": Precision.FP8})
    manifest = plain.model_copy(update={"recipe": recipe})
    hint = refused(manifest, [make_plan("sm89")], make_machine("sm86")).hint
    assert hint == "sdopt convert --again engines/mine --target rtx:sm86,sm89 --precision auto"


def test_every_reason_is_told_and_the_most_final_is_mended(plain: BundleManifest) -> None:
    plan = make_plan("sm86", system="Windows AMD64", version="1.6.0.1")
    error = refused(plain, [plan], make_machine(driver="535.1"))
    for word in ("Windows AMD64", "sm86", "1.6.0.1", "535.1"):
        assert word in error.message
    assert error.hint.startswith("sdopt convert")


def test_each_of_two_plans_fails_otherwise(plain: BundleManifest) -> None:
    plans = [make_plan("sm89", version="1.6.0.1"), make_plan("sm86")]
    error = refused(plain, plans, make_machine())
    assert "1.6.0.1" in error.message, "the plan of this GPU is of another version"


def test_a_reason_of_one_component_names_it(plain: BundleManifest) -> None:
    plans = {
        ComponentName.UNET: [make_plan()],
        ComponentName.VAE_DECODER: [make_plan("sm86", "vae_decoder")],
    }
    with pytest.raises(MissingHardware, match=r"^vae_decoder: there are plans for sm86"):
        choose_plans(FOLDER, with_plans(plain, plans), make_machine())


def test_old_drivers_of_other_systems_and_unknown_packages_are_left_to_the_runtime(plain: BundleManifest) -> None:
    old = make_machine(driver="500.1")
    library = old.libraries["tensorrt-rtx"]
    unknown = Machine(old.system, old.gpus, {"tensorrt-rtx": type(library)(library.version)})
    assert choose(plain, [make_plan()], unknown)
    windows = make_machine(driver="500.1", system="Windows AMD64")
    assert choose(plain, [make_plan(system="Windows AMD64")], windows)
    assert choose(plain, [make_plan()], make_machine(driver="525.1", cuda_major=12))


def test_streamed_weights_and_unknown_memory_are_no_obstacle(plain: BundleManifest) -> None:
    assert choose(plain, [make_plan(plan_bytes=90 << 30, weight_streaming=True)], make_machine())
    assert choose(plain, [make_plan(plan_bytes=90 << 30)], make_machine(memory_bytes=0))


def test_packages_append_to_versions(plain: BundleManifest) -> None:
    assert choose(plain, [make_plan()], make_machine(version="1.7.1.116.post1"))
