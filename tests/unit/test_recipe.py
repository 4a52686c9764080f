"""Recipes: flag over file over default; the unknown is named with the nearest; what was saved reads the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.cli.convert import dump_recipe, merge_recipe
from sdopt.errors import RecipeError
from sdopt.model.component import ComponentName
from sdopt.model.family import Prediction
from sdopt.model.precision import Precision
from sdopt.model.recipe import BuildRecipe, Dialect, VerifySettings, parse_recipe
from sdopt.model.target import Runtime, Target


@pytest.mark.parametrize(
    ("values", "named", "offered"),
    [
        ({"precison": "fp32"}, "precison", "'precision'"),
        ({"precision": "fp23"}, "fp23", "'fp32'"),
        ({"precision": "FP16"}, "FP16", "fp16"),
        ({"target": "openvno"}, "openvno", "'openvino'"),
        ({"dialect": "opset24"}, "opset24", "'opset23'"),
        ({"verify": {"step": 3}}, "verify.step", "'steps'"),
        ({"component_precision": {"unte": "fp32"}}, "unte", "'unet'"),
        ({"component_precision": {"unet": "bf61"}}, "bf61", "'bf16'"),
    ],
)
def test_an_unknown_key_or_value_is_named_with_the_nearest(values: dict[str, Any], named: str, offered: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, where="here.toml")
    assert "here.toml" in caught.value.message
    assert named in caught.value.message
    assert offered in caught.value.hint


@pytest.mark.parametrize(
    "values",
    [{"batch": 0}, {"batch": -1}, {"batch": 65}, {"batch": "many"}, {"size": "512"}, {"size": "0x64"}, {"tokens": 75},
     {"verify": {"steps": 0}}, {"verify": {"seed": -1}}, {"verify": 3}, {"dynamic": "perhaps"}],
)  # fmt: skip
def test_a_bad_value_is_refused_by_key(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, where="x")
    problem = str(caught.value)
    key, value = next(iter(values.items()))
    assert key in problem
    if not isinstance(value, dict):
        assert str(value) in problem


def merge(file: Path | None = None, *, no_verify: bool = False, **flags: Any) -> BuildRecipe:
    return merge_recipe(file, {"source": "m", **flags}, no_verify=no_verify)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('precision = "fp32"\nbatch = 3\nsource = "from-file"\n[verify]\nsteps = 4\n')
    recipe = merge(file, source=None, batch=2, precision=None, size=None)
    assert (recipe.source, recipe.precision, recipe.batch, recipe.size) == ("from-file", Precision.FP32, 2, "")
    assert recipe.verify == VerifySettings(steps=4)
    assert merge().batch == BuildRecipe().batch
    assert merge(file, source="flag").source == "flag"


def test_the_precision_flag_wins_over_all_that_the_file_says_of_precision(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('source = "m"\nprecision = "bf16"\n[component_precision]\nvae_decoder = "bf16"\n', encoding="utf-8")
    kept = merge_recipe(file, {"batch": 2}, no_verify=False)
    assert kept.precision_of(ComponentName.VAE_DECODER) is Precision.BF16
    flagged = merge_recipe(file, {"precision": "fp32"}, no_verify=False)
    assert {flagged.precision_of(name) for name in ComponentName} == {Precision.FP32}


def test_no_verify_keeps_the_rest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[verify]\nsteps = 4\n")
    assert merge(file, no_verify=True).verify == VerifySettings(steps=4, enabled=False)
    assert not merge(no_verify=True).verify.enabled


def test_an_error_says_whether_the_file_or_the_command_line_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("batch = 0\n")
    with pytest.raises(RecipeError, match=r"r\.toml"):
        merge(file, batch=1)
    with pytest.raises(RecipeError, match=r"^--batch is 0, and has to be a whole number from 1 to 64$"):
        merge(batch=0)


@pytest.mark.parametrize(
    ("flag", "value", "message", "hint"),
    [
        ("tokens", 100, "--tokens is 100, and has to be 77 or a multiple of it up to 616", ""),
        ("target", "foo", "--target: there is no target 'foo'", "known: cpu, "),
        ("precision", "fp23", "--precision is 'fp23', which sdopt does not know", "did you mean 'fp32'?"),
        ("prediction", "foo", "--prediction is 'foo', which sdopt does not know", "known: epsilon, v_prediction"),
        ("max_memory", "foo", "--max-memory: 'foo' is not an amount of memory such as 12GiB", ""),
        ("max_memory", "1", "--max-memory: '1' is not an amount of memory such as 12GiB", ""),
        ("lora_slots", "0", "--lora-slots: '0' is not a rank from 1 to 1024, ", "for example 64"),
        ("lora", ("",), "--lora: '' does not name a LoRA", "for example ink.safetensors:0.8"),
        ("size", "512", "--size: '512' is not WIDTHxHEIGHT in pixels", "for example --size 512x512"),
        ("min_ssim", 2.0, "--min-ssim is 2.0, and has to be a number from 0 to 1", ""),
    ],
)
def test_a_bad_flag_is_named_as_typed(flag: str, value: object, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        merge(**{flag: value})
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)
    assert "got" not in caught.value.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": "many"}, "x.toml: batch is 'many', and has to be a whole number from 1 to 64"),
        ({"lora_slots": "0"}, "x.toml: lora_slots: '0' is not a rank from 1 to 1024, "),
        ({"verify": {"steps": 0}}, "x.toml: verify.steps is 0, and has to be a whole number from 1 to 1000"),
        ({"verify": {"prompts": [3]}}, "x.toml: verify.prompts.0 is 3, and has to be a text"),
        ({"verify": 3}, "x.toml: verify is 3, and has to be a table"),
        ({"dynamic": "perhaps"}, "x.toml: dynamic is 'perhaps', and has to be true or false"),
    ],
)
def test_a_bad_value_of_a_file_is_named_as_in_the_file(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, where="x.toml")
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("content", [b"batch = ", b"\xff\xfe", b"batch = 1\nbatch = 2\n"])
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match="TOML"):
        merge(file)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            merge(path)


def test_no_source_is_refused() -> None:
    with pytest.raises(RecipeError, match="SOURCE"):
        merge(source=None)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
recipes = st.builds(
    BuildRecipe,
    source=texts.filter(bool), precision=st.sampled_from(Precision),
    target=st.sampled_from([*map(Target, Runtime), Target(Runtime.RTX, ("sm86", "sm89"))]),
    component_precision=st.dictionaries(
        st.sampled_from(ComponentName), st.sampled_from([p for p in Precision if not p.is_quantized])
    ),
    size=st.sampled_from(["", "64x128", "64x64..96x128", "64x64,64x96"]), batch=st.integers(1, 64),
    tokens=st.sampled_from([77, 231]), require_fused=st.booleans(), max_memory=st.sampled_from(["", "12GiB"]),
    dynamic=st.booleans(),
    dialect=st.sampled_from(Dialect), vae=texts, prediction=st.none() | st.sampled_from(Prediction),
    verify=st.builds(
        VerifySettings, enabled=st.booleans(), prompts=st.lists(texts, max_size=3).map(tuple),
        steps=st.integers(1, 1000), seed=st.integers(0, 2**63 - 1), guidance_scale=st.floats(0, 100),
    ),
)  # fmt: skip


@given(recipes)
def test_a_saved_recipe_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, recipe: BuildRecipe) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.toml"
    file.write_bytes(dump_recipe(recipe))
    assert merge_recipe(file, {}, no_verify=False) == recipe
