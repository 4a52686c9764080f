"""Where pictures and bundles cannot go is said before any work, by the name that was typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sdopt.cli.generate import generate
from sdopt.disk.staging import require_ours
from sdopt.errors import ArtifactError, SdoptError, UsageError
from sdopt.model.request import DrawRequest, parse_request
from sdopt.tasks.draw_files import draw_files


def refuse(folder: Path, output: Path, pictures: int = 1) -> SdoptError:
    """The error of drawing to `output`; a bundle that is not there would be the next."""
    requests: list[DrawRequest] = [parse_request({"prompt": "a"})] * pictures
    with pytest.raises(SdoptError) as caught:
        draw_files(folder, output, requests)
    return caught.value


@pytest.mark.parametrize("name", ["/proc/x.png", "/proc/x", "/proc/a/x.png"])
def test_a_place_where_the_system_lets_nothing_be_made(name: str, tmp_path: Path) -> None:
    error = refuse(tmp_path / "none", Path(name))
    assert isinstance(error, ArtifactError)
    assert error.message.startswith(f"cannot write {name}: ")


@pytest.mark.parametrize(("pictures", "offered"), [(1, "x.png"), (2, "x")])
def test_another_kind_of_picture(pictures: int, offered: str, tmp_path: Path) -> None:
    error = refuse(tmp_path / "none", tmp_path / "x.JPG", pictures)
    assert isinstance(error, UsageError)
    assert "pictures are PNG files" in error.message
    assert error.hint.endswith(f"-o {tmp_path / offered}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "pictures", "unet/x.png"])
def test_a_bundle_takes_no_pictures(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "bundle.json").write_text("{}")
    error = refuse(tmp_path / "none", folder / inside)
    assert isinstance(error, UsageError)
    assert "and pictures do not belong there" in error.message
    assert error.hint.endswith(f"-o {tmp_path / 'b-pictures'}")
    assert [path.name for path in folder.iterdir()] == ["bundle.json"]


def test_another_place_is_taken_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    assert "is not an sdopt bundle" in refuse(tmp_path / "none", tmp_path / "pictures" / "x.png").message
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_part_of_a_bundle_hints_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "b"
    (folder / "unet").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for typed, above in (("b/unet", "b"), (str(folder / "unet"), str(folder))):
        error = refuse(Path(typed), tmp_path / "pictures")
        assert error.message == f"{typed} is a part of a bundle, and not all of it"
        assert error.hint == f"give the folder above, {above}"


def test_nothing_to_draw_hints_the_folder_that_was_typed() -> None:
    result = CliRunner().invoke(generate, ["my bundle"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.hint == "give a prompt, as in: sdopt generate 'my bundle' \"a large red circle\""


def test_a_bundle_where_the_system_lets_nothing_be_made(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write /proc/x: "):
        require_ours(Path("/proc/x"))
    require_ours(tmp_path / "deep" / "bundle")
    assert list(tmp_path.iterdir()) == []
