"""Files that ship with sdopt or are the user's own: found by name or path, and prompts read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdopt.disk.configs import find_config, find_prompts, read_prompts
from sdopt.errors import RecipeError
from sdopt.model.quantization import CalibrationSettings
from tests.conftest import TINY_SHAPES


def test_a_name_is_found_among_the_shipped_files() -> None:
    assert find_config("quantization", "int8", "toml").name == "int8.toml"
    assert find_config("prompts", "general", "txt").is_file()


def test_an_unknown_name_gives_the_near_ones() -> None:
    with pytest.raises(RecipeError, match=r"no 'genral' in configs/prompts") as caught:
        find_config("prompts", "genral", "txt")
    assert "did you mean 'general'?" in caught.value.hint


@pytest.mark.parametrize("name", ["", "..", "general.toml"])
def test_a_name_is_no_way_out_of_the_folder(name: str) -> None:
    with pytest.raises(RecipeError):
        find_config("prompts", name, "txt")


def test_a_path_is_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert find_config("prompts", "mine.txt", "txt").read_text() == "a"
    assert find_config("prompts", str(tmp_path / "mine.txt"), "txt") == tmp_path / "mine.txt"
    for missing in ("other.txt", "./general", str(tmp_path)):
        with pytest.raises(RecipeError, match="there is no file"):
            find_config("prompts", missing, "txt")


def test_the_wheel_has_them_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdopt.disk.configs as configs

    (tmp_path / "sdopt" / "configs" / "prompts").mkdir(parents=True)
    (tmp_path / "sdopt" / "configs" / "prompts" / "general.txt").write_text("a")
    monkeypatch.setattr(configs, "_ROOTS", (tmp_path / "sdopt" / "configs", *configs._ROOTS[1:]))
    assert find_config("prompts", "general", "txt").is_relative_to(tmp_path)


def test_blanks_and_comments_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n  a cat  \n\t\na poster, #3\nein Käse\r\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a poster, #3", "ein Käse")


@pytest.mark.parametrize("text", [b"", b"\n \n# nothing\n"])
def test_a_file_without_prompts_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match="no calibration prompts"):
        read_prompts(path)


@pytest.mark.parametrize(("data", "reason"), [(b"\xff\xfe\x00", "cannot read"), (b"a\n" * 600_000, "larger than any")])
def test_what_is_no_list_of_prompts_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=reason):
        read_prompts(path)


def test_prompts_are_those_named_then_the_checkpoints_own_then_the_general(tmp_path: Path) -> None:
    settings = CalibrationSettings()
    general = read_prompts(find_config("prompts", "general", "txt"))
    assert find_prompts(settings, "somebody/model") == general
    assert find_prompts(settings, str(tmp_path)) == general
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    assert find_prompts(settings, str(tmp_path)) == ("a", "b")
    assert find_prompts(settings.model_copy(update={"prompts": "general"}), str(tmp_path)) == general


@pytest.mark.parametrize("path", [find_config("prompts", "general", "txt"), TINY_SHAPES / "prompts.txt"], ids=str)
def test_shipped_prompts_are_many_and_different(path: Path) -> None:
    prompts = read_prompts(path)
    assert len(prompts) >= 80
    assert len(set(prompts)) == len(prompts)
    assert all(prompt.isascii() and len(prompt) < 300 for prompt in prompts)


def test_the_prompts_of_tiny_shapes_have_all_of_its_words() -> None:
    words = " ".join(read_prompts(TINY_SHAPES / "prompts.txt")).replace(",", "").split()
    listed = "a at on the background small large left right top bottom centre circle square triangle star"
    colours = "red green blue yellow purple orange white black"
    assert set(words) == set(f"{listed} {colours}".split())
