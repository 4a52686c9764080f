"""What to quantise, as files say it: those that ship hold for the layers that real models have, and typing errors are
named.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sdopt.checkpoint.checkpoint import Checkpoint
from sdopt.checkpoint.source import open_checkpoint
from sdopt.cli.convert import dump_recipe, merge_recipe
from sdopt.convert.plan import BuildPlan, resolve_build
from sdopt.disk.configs import find_config
from sdopt.errors import RecipeError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import (
    CalibrationSettings,
    ComponentQuantization,
    QuantizationSettings,
    Scheme,
    parse_quantization,
)
from sdopt.model.recipe import BuildRecipe, Dialect, VerifySettings, parse_recipe
from sdopt.model.target import parse_target
from sdopt.networks.modules import build_network
from tests.conftest import REPOSITORY, TINY_SHAPES

FOLDER = REPOSITORY / "configs" / "quantization"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))
UNET, TEXT, TEXT_2 = ComponentName.UNET, ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2
DECODER, ENCODER = ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER

CROSS = {kind: f"CrossAttn{kind}Block2D" for kind in ("Down", "Up")}
SD15: dict[ComponentName, dict[str, Any]] = {
    UNET: {
        "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [CROSS["Down"]] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + [CROSS["Up"]] * 3,
    },
    TEXT: {"architectures": ["CLIPTextModel"], "hidden_size": 768, "num_hidden_layers": 12},
    DECODER: {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}  # fmt: skip
SD15[ENCODER] = SD15[DECODER]
SDXL: dict[ComponentName, dict[str, Any]] = {
    **SD15,
    UNET: {
        "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", CROSS["Down"], CROSS["Down"]],
        "up_block_types": [CROSS["Up"], CROSS["Up"], "UpBlock2D"],
    },
    TEXT_2: {
        "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "num_hidden_layers": 32,
        "hidden_act": "gelu",
    },
}  # fmt: skip
MODELS = {"sd15": SD15, "sdxl": SDXL}


OF_RESNETS = ("conv1", "conv2", "time_emb_proj")


@cache
def layers_of(model: str, name: ComponentName) -> tuple[str, ...]:
    """The layers of a full-size network that have a weight of two axes or more, by their names in torch."""
    with torch.device("meta"):
        network = build_network(name, MODELS[model][name])
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return tuple(key.removeprefix("network.") for key, part in network.named_modules() if isinstance(part, kinds))


def read(name: str) -> QuantizationSettings:
    path = find_config("quantization", name, "toml")
    assert path == FOLDER / f"{name}.toml"
    return parse_quantization(tomllib.loads(path.read_text()), where=str(path))


def group_layers(settings: ComponentQuantization, layers: tuple[str, ...]) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for layer in layers:
        groups[settings.group_of(layer)].add(layer)
    return groups


def test_every_precision_that_quantises_has_a_file() -> None:
    assert {precision.value for precision in Precision if precision.is_quantized} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_ships_is_read_and_names_every_component(name: str) -> None:
    settings = read(name)
    assert settings.components.keys() == set(ComponentName)
    assert settings.components[UNET].scheme.value == name


@pytest.mark.parametrize("name", FILES)
def test_every_pattern_that_ships_means_a_layer_of_a_real_model(name: str) -> None:
    for component, settings in read(name).components.items():
        having = [model for model, parts in MODELS.items() if component in parts]
        known = {layer for model in having for layer in layers_of(model, component)}
        assert known
        for pattern in (*settings.keep, *(each for patterns in settings.classes.values() for each in patterns)):
            assert any(fnmatchcase(layer, pattern) for layer in known), f"{component}: {pattern} means nothing"


def shown(*, down: int, crossed_down: set[int], crossed_up: set[int]) -> set[str]:
    blocks = ["mid_block", *(f"{way}_blocks.{number}" for way in ("down", "up") for number in range(down))]
    groups = {f"{block} convolutions" for block in blocks} | {"mid_block transformer"}
    groups |= {f"down_blocks.{number} transformer" for number in crossed_down}
    return groups | {f"up_blocks.{number} transformer" for number in crossed_up}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("model", "groups"),
    [
        ("sd15", shown(down=4, crossed_down={0, 1, 2}, crossed_up={1, 2, 3})),
        ("sdxl", shown(down=3, crossed_down={1, 2}, crossed_up={0, 1})),
    ],
)
def test_a_real_unet_is_judged_by_block_and_class(name: str, model: str, groups: set[str]) -> None:
    layers = layers_of(model, UNET)
    found = group_layers(read(name).components[UNET], layers)
    kept = found.pop("")
    assert found.keys() == groups
    ends = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    if model == "sdxl":
        ends |= {"add_embedding.linear_1", "add_embedding.linear_2"}
    inner = kept - ends
    assert ends <= kept
    assert inner == {layer for layer in layers if layer.endswith("conv_shortcut")} != set()
    for group, members in found.items():
        block, _, kind = group.partition(" ")
        assert all(layer.startswith(f"{block}.") for layer in members), group
        assert all((".attentions." in layer) == (kind == "transformer") for layer in members), group
        assert not any(".resnets." in layer and not layer.endswith(OF_RESNETS) for layer in members)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("model", "component", "kept"),
    [
        ("sd15", TEXT, {"position_embedding"}), ("sdxl", TEXT_2, {"position_embedding"}),
        ("sd15", DECODER, {"conv_in", "conv_out", "post_quant_conv"}),
        ("sd15", ENCODER, {"conv_in", "conv_out", "quant_conv"}),
    ],
)  # fmt: skip
def test_the_other_networks_are_judged_whole(name: str, model: str, component: ComponentName, kept: set[str]) -> None:
    found = group_layers(read(name).components[component], layers_of(model, component))
    assert found.keys() == {"", "all layers"}
    assert {layer.rpartition(".")[2] for layer in found[""]} == kept
    assert len(found["all layers"]) > 20
    assert any("shortcut" in layer or "token_embedding" in layer for layer in found["all layers"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("component", ComponentName)
def test_blocks_of_real_networks_are_few_and_none_is_a_layer(model: str, component: ComponentName) -> None:
    """Without classes, what is judged together is a block; a name that no block has is not a group for each layer."""
    if component not in MODELS[model]:
        return
    layers = layers_of(model, component)
    groups = group_layers(ComponentQuantization(scheme=Scheme.INT8_WEIGHTS), layers)
    assert sum(len(members) for members in groups.values()) == len(layers)
    assert len(groups) <= 14
    lone = {group for group, members in groups.items() if len(members) == 1}
    assert lone <= {"conv_in", "conv_out", "decoder", "encoder", "quant_conv", "post_quant_conv", "text_projection"}


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@given(names, st.lists(names, max_size=3).map(tuple), st.dictionaries(names, st.lists(names, max_size=2).map(tuple)))
def test_every_name_has_a_group_or_is_kept(
    layer: str, keep: tuple[str, ...], classes: dict[str, tuple[str, ...]]
) -> None:
    settings = ComponentQuantization(scheme=Scheme.INT8, keep=keep, classes=classes)
    assert bool(settings.group_of(layer)) != any(fnmatchcase(layer, pattern) for pattern in keep)
    whole = settings.model_copy(update={"by_block": False})
    assert whole.group_of(layer) in ("", "all layers")
    assert bool(whole.group_of(layer)) == bool(settings.group_of(layer))


def test_keeping_stands_above_classes_and_the_first_class_counts() -> None:
    settings = ComponentQuantization(
        scheme=Scheme.INT8, keep=("*.conv1",), classes={"attention": ("*.attn*",), "rest": ("*",)}
    )
    assert settings.group_of("up_blocks.2.resnets.0.conv1") == ""
    assert settings.group_of("up_blocks.2.resnets.0.conv2") == "up_blocks.2 rest"
    assert settings.group_of("up_blocks.12.attentions.0.attn1.to_q") == "up_blocks.12 attention"
    assert settings.group_of("UP_BLOCKS.2.resnets.0.CONV1") != "", "a shell tells capitals apart"


# Refused, by name


UNET_INT8: dict[str, Any] = {"components": {"unet": {"scheme": "int8"}}}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "components"),
        ({"components": {}}, "components"),
        ({"components": {"unte": {"scheme": "int8"}}}, "unte"),
        ({"components": {"unet": {"scheme": "int7"}}}, "components.unet.scheme"),
        ({"components": {"unet": {}}}, "components.unet.scheme"),
        ({"components": {"unet": {"scheme": "int8", "kepe": []}}}, "components.unet.kepe"),
        ({"components": {"unet": {"scheme": "int8", "keep": "conv_in"}}}, "components.unet.keep"),
        ({"components": {"unet": {"scheme": "int8", "classes": ["*"]}}}, "components.unet.classes"),
        ({**UNET_INT8, "calibrate": {}}, "calibrate"),
        ({**UNET_INT8, "held_out_error": 0}, "held_out_error"),
        ({**UNET_INT8, "held_out_error": 1.5}, "held_out_error"),
        ({**UNET_INT8, "held_out_error": "nan"}, "held_out_error"),
        ({**UNET_INT8, "calibration": {"step": 3}}, "calibration.step"),
        ({**UNET_INT8, "calibration": {"scales": "mse"}}, "calibration.scales"),
        ({**UNET_INT8, "calibration": {"trajectories": 0}}, "calibration.trajectories"),
        ({**UNET_INT8, "calibration": {"held_out": 0}}, "calibration.held_out"),
        ({**UNET_INT8, "calibration": {"guidance_scales": []}}, "calibration.guidance_scales"),
        ({**UNET_INT8, "calibration": {"guidance_scales": [7.5, -1]}}, "calibration.guidance_scales.1"),
        ({**UNET_INT8, "calibration": {"percentile": 100.1}}, "calibration.percentile"),
        ({**UNET_INT8, "calibration": {"smoothquant_alpha": 1}}, "calibration.smoothquant_alpha"),
    ],
)
def test_what_a_file_may_not_say_is_refused_by_key(values: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.toml: ") as caught:
        parse_quantization(values, where="mine.toml")
    assert named in caught.value.message


@pytest.mark.parametrize("name", [name for name in ComponentName if name is not UNET])
@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.FP8])
def test_only_a_unet_computes_in_8_bits(name: ComponentName, scheme: Scheme) -> None:
    with pytest.raises(RecipeError, match=f"{name} takes weights alone: int8-weights or int4-weights"):
        parse_quantization({"components": {name.value: {"scheme": scheme.value}}}, where="mine.toml")
    parse_quantization({"components": {name.value: {"scheme": "int4-weights"}}}, where="mine.toml")


@pytest.mark.parametrize("scheme", Scheme)
def test_a_scheme_has_a_type_to_store_and_a_largest_number(scheme: Scheme) -> None:
    assert scheme.weight_dtype.itemsize_bytes == 1
    assert not scheme.weight_dtype.is_float or scheme.weight_dtype is DType.FP8
    assert scheme.quantizes_activations == (not scheme.value.endswith("weights"))
    limits = {Scheme.FP8: torch.finfo(torch.float8_e4m3fn).max, Scheme.INT4_WEIGHTS: 7.0}
    assert scheme.largest == limits.get(scheme, torch.iinfo(torch.int8).max)


# Recipes and plans


@cache
def tiny_shapes() -> Checkpoint:
    return open_checkpoint(str(TINY_SHAPES))


def resolve(**values: Any) -> BuildPlan:
    return resolve_build(tiny_shapes(), parse_recipe({"source": str(TINY_SHAPES), **values}, where="a test"))


@pytest.mark.parametrize("name", FILES)
def test_a_plan_holds_what_the_file_says(name: str) -> None:
    assert resolve(quantization=name, target="rtx:sm89").quantization == read(name)


def test_int8_on_a_cpu_is_its_file_and_what_stays_is_as_without() -> None:
    plan, plain = resolve(precision="int8"), resolve()
    assert plan.quantization == read("int8")
    assert plain.quantization is None
    assert {n: (p.precision, p.backend, p.architecture) for n, p in plan.components.items()} == {
        n: (p.precision, p.backend, p.architecture) for n, p in plain.components.items()
    }


def test_a_file_of_ones_own_stands_above_the_precisions(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[components.unet]\nscheme = "int8-weights"\n')
    plan = resolve(precision="int8", quantization=str(file))
    assert plan.quantization is not None
    assert plan.quantization.components.keys() == {UNET}
    assert plan.quantization.components[UNET].scheme is Scheme.INT8_WEIGHTS
    assert plan.quantization.calibration == CalibrationSettings()
    assert resolve(quantization=str(file), precision="fp32").quantization == plan.quantization


@pytest.mark.parametrize("target", ["cpu", "openvino", "onnxruntime"])
def test_fp8_is_refused_where_nothing_computes_in_it(target: str) -> None:
    for values in ({"precision": "fp8"}, {"quantization": "fp8"}):
        with pytest.raises(RecipeError, match=f"the target {target} has no FP8 arithmetic") as caught:
            resolve(target=target, **values)
        assert "rtx:sm89" in caught.value.hint


@pytest.mark.parametrize("target", ["rtx:sm89", "rtx:sm89,sm120"])
def test_fp8_is_planned_where_plans_are_made(target: str) -> None:
    plan = resolve(target=target, precision="fp8")
    assert plan.quantization is not None
    assert plan.quantization.components[UNET].scheme is Scheme.FP8


def test_an_older_dialect_has_no_quantised_graph() -> None:
    with pytest.raises(RecipeError, match="opset18"):
        resolve(precision="int8", dialect="opset18")
    assert resolve(dialect="opset18").quantization is None


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_one_component_has_no_quantised_precision_of_its_own(precision: str) -> None:
    with pytest.raises(RecipeError, match=f"unet: a quantization file says which components become {precision}"):
        parse_recipe({"component_precision": {"unet": precision}}, where="a test")


def test_what_is_not_quantised_has_a_precision_of_its_own() -> None:
    recipe = parse_recipe({"precision": "int8", "component_precision": {"vae_decoder": "fp32"}}, where="a test")
    assert recipe.precision_of(DECODER) is Precision.FP32
    assert recipe.precision_of(UNET) is Precision.AUTO
    assert recipe.quantization_file == "int8"
    assert parse_recipe({"precision": "bf16"}, where="a test").quantization_file == ""


def test_a_file_that_is_not_there_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no 'int9' in configs/quantization") as caught:
        resolve(quantization="int9")
    assert "'int8'" in caught.value.hint
    with pytest.raises(RecipeError, match=r"there is no file .*none\.toml"):
        resolve(quantization=str(tmp_path / "none.toml"))
    for number, content in enumerate([b"components = ", b"\xff\xfe", b"[components.unet]\nscheme = 8"]):
        path = tmp_path / f"bad-{number}.toml"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=path.name):
            resolve(quantization=str(path))


quantized_recipes = st.builds(
    BuildRecipe,
    source=st.just("m"),
    precision=st.sampled_from(Precision),
    target=st.sampled_from([parse_target("cpu"), parse_target("rtx:sm89")]),
    quantization=st.sampled_from(["", "int8", "./mine.toml"]),
    require_quantized=st.booleans(),
    dialect=st.sampled_from(Dialect),
    verify=st.builds(VerifySettings, max_psnr_loss=st.floats(0, 100), min_ssim=st.floats(0, 1)),
)


@given(quantized_recipes)
def test_a_saved_recipe_quantises_the_same(tmp_path_factory: pytest.TempPathFactory, recipe: BuildRecipe) -> None:
    file = tmp_path_factory.getbasetemp() / "quantized.toml"
    file.write_bytes(dump_recipe(recipe))
    assert merge_recipe(file, {}, no_verify=False) == recipe


def test_flags_of_the_picture_budget_go_where_the_file_has_them(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('source = "m"\nprecision = "int8"\n[verify]\nsteps = 4\nmax_psnr_loss = 9.0\n')
    recipe = merge_recipe(file, {"min_ssim": 0.5, "require_quantized": True, "max_psnr_loss": None}, no_verify=False)
    assert recipe.verify == VerifySettings(steps=4, max_psnr_loss=9.0, min_ssim=0.5)
    assert recipe.require_quantized
    flagged = merge_recipe(file, {"max_psnr_loss": 3.0}, no_verify=False)
    assert flagged.verify == VerifySettings(steps=4, max_psnr_loss=3.0)
    with pytest.raises(RecipeError, match="--min-ssim"):
        merge_recipe(file, {"min_ssim": 1.5}, no_verify=False)
