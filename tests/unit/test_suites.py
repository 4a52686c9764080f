"""Suite files: each defect is named with its file, key and the nearest that is known; the shipped ones are whole."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.bench.case.report import Scope
from sdopt.bench.case.suites import expand, load_suite, parse_suite
from sdopt.errors import ArtifactError, SdoptError, UsageError

SUITES = Path(__file__).parents[2] / "configs" / "suites"
CASE = '[[cases]]\nname = "a"\n'


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "s.toml").write_text(text)
    return str(tmp_path / "s.toml")


def test_one_run_for_each_case_and_number_of_steps(tmp_path: Path) -> None:
    text = (
        'name = "s"\n[method]\nrepeats = 4\n' + CASE + 'steps = [5, 10]\n[[cases]]\nname = "b"\nmethod = {repeats = 1}'
    )
    runs = expand(load_suite(write(tmp_path, text)))
    assert [(run.name, run.steps, run.method.repeats) for run in runs] == [("a-5", 5, 4), ("a-10", 10, 4), ("b", 20, 1)]


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (f'nam = "s"\n{CASE}', "'nam'", "did you mean 'name'"),
        (f'{CASE}promts = ["a"]', r"'cases\.0\.promts'", "did you mean 'prompts'"),
        (f"[method]\nrepeat = 1\n{CASE}", r"'method\.repeat'", "did you mean 'repeats'"),
        (f"{CASE}method = {{ most_picture = 1 }}", r"'cases\.0\.method\.most_picture'", "did you mean 'most_pictures'"),
        (f"{CASE}steps = []", r"cases\.0\.steps is empty", ""),
        ("cases = []", "cases is empty", ""),
        ("", "cases: Field required", ""),
        (f"{CASE}steps = [0]", r"cases\.0\.steps\.0: .*\(got 0\)", ""),
        (f'{CASE}against = ["eagre"]', "'eagre'", "did you mean 'eager'"),
        (f'{CASE}recipe = {{ taget = "cpu" }}', r"cases\.0\.recipe: .*'taget'", "did you mean 'target'"),
        (f"{CASE}{CASE}", "two runs have the name 'a'", ""),
        (f'{CASE}steps = [1, 2]\n[[cases]]\nname = "a-2"', "two runs have the name 'a-2'", ""),
        (f"{CASE}steps = [3, 3]", "two runs have the name 'a-3'", ""),
        ('[[cases]]\nname = "../up"', r"cases\.0\.name", ""),
        (f'{CASE}prompts = ["a"]\nprompt_file = "general"', "say the same thing", ""),
        (f'{CASE}prompt_file = "generl"', "'generl' in configs/prompts", "did you mean 'general'"),
        (f'{CASE}scope = "all"', r"cases\.0\.scope", ""),
        ("[[cases", "cannot read the suite", ""),
    ],
)
def test_a_defect_is_named(tmp_path: Path, text: str, said: str, hint: str) -> None:
    head = "" if text.startswith("nam") else 'name = "s"\n'
    with pytest.raises(UsageError, match=said) as raised:
        load_suite(write(tmp_path, head + text))
    assert "s.toml" in raised.value.message
    assert hint in raised.value.hint


def test_a_newer_schema_is_refused_before_its_keys(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="schema 2"):
        load_suite(write(tmp_path, f'schema_version = 2\nnews = 1\nname = "s"\n{CASE}'))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        load_suite(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="configs/suites") as raised:
        load_suite("nightli")
    assert "did you mean 'nightly'" in raised.value.hint


def test_prompts_of_a_file_become_the_cases_own(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# not this\n\u05e9\u05dc\n<script>\n")
    suite = load_suite(write(tmp_path, f'name = "s"\n{CASE}prompt_file = "{tmp_path / "p.txt"}"'))
    assert (suite.cases[0].prompts, suite.cases[0].prompt_file) == (("\u05e9\u05dc", "<script>"), "")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["name", "cases", "method", "schema_version", "description", "other"])


@given(st.dictionaries(KEYS, VALUES) | st.builds(lambda case: {"name": "s", "cases": [case]}, VALUES))
def test_whatever_a_file_holds_it_is_a_suite_or_an_error(values: dict[str, Any]) -> None:
    try:
        suite, said = parse_suite(values, where="planted"), ""
    except SdoptError as error:
        suite, said = None, error.message
    assert expand(suite) if suite else said.startswith("planted")


def test_the_suites_that_ship_say_what_the_files_name_says() -> None:
    files = sorted(SUITES.glob("*.toml"))
    assert {path.stem for path in files} == {"smoke", "latency", "fidelity", "nightly"}
    for path in files:
        assert load_suite(path.stem).name == tomllib.loads(path.read_text("utf-8"))["name"] == path.stem


def test_the_nightly_suite_is_what_the_gate_follows() -> None:
    runs = {run.name: run for run in expand(load_suite("nightly"))}
    pictures, unet = runs["tiny-shapes"], runs["sd15-unet"]
    assert (pictures.case.scope, pictures.case.against) == (Scope.PICTURES, ("eager-fp32",))
    assert (unet.case.scope, unet.case.source, unet.case.recipe["target"]) == (Scope.UNET, "random:sd15", "cpu")
    assert min(pictures.method.repeats, unet.method.repeats) >= 5
