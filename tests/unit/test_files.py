"""Files are whole or absent, and no path leaves its folder."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.disk import files
from sdopt.disk.files import disk_errors, hash_file, require_free_disk, resolve_inside, write_file
from sdopt.errors import ArtifactError, MissingHardware, UnsafeInputError

pieces = st.sampled_from(["..", ".", "", "a", "b", "link", "/", "\\", "c:", "\0", "~", "...", "a b", "%2e%2e"])


@given(st.lists(pieces, max_size=6).map("/".join) | st.text(max_size=12))
def test_a_path_stays_inside_or_is_refused(tmp_path_factory: pytest.TempPathFactory, relative: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "inside"
    if not folder.exists():
        (folder / "a").mkdir(parents=True)
        (folder / "link").symlink_to("/etc")
        (folder / "a" / "link").symlink_to("..")
    try:
        path = resolve_inside(folder, relative)
    except UnsafeInputError:
        return
    try:
        real = path.resolve()
    except (OSError, ValueError):
        return  # too long, or a surrogate: it cannot be opened either
    assert real.is_relative_to(folder.resolve())


@pytest.mark.parametrize(
    "relative",
    ["", "/etc/passwd", "../x", "a/../../x", "a/..", "C:\\x", "a\\..\\b", "x\0y", "link", "link/passwd", "a/link/x"],
)
def test_what_leaves_is_refused(relative: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "a" / "link").symlink_to("/etc")
    with pytest.raises(UnsafeInputError):
        resolve_inside(tmp_path, relative)


def test_plain_paths_are_joined(tmp_path: Path) -> None:
    assert resolve_inside(tmp_path, "unet/model.onnx") == tmp_path / "unet" / "model.onnx"


@given(st.binary(max_size=5000))
def test_what_was_written_is_read_and_hashed(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    write_file(path, data)
    assert path.read_bytes() == data
    assert hash_file(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "interrupt"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    error: BaseException = KeyboardInterrupt() if step == "interrupt" else OSError(errno.EIO, "injected")

    def fail(*_: object, **__: object) -> None:
        raise error

    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    elif step == "write":
        real = os.fdopen

        def fdopen(descriptor: int, mode: str) -> object:
            file = real(descriptor, mode)
            file.close()  # the next write fails
            return file

        monkeypatch.setattr(files.os, "fdopen", fdopen)
        error = ValueError()
    else:
        monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
        write_file(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_to_do(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(code, "injected")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(MissingHardware, match="full") as caught:
        write_file(tmp_path / "f", b"x")
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_missing_permission_is_named(code: int) -> None:
    with pytest.raises(ArtifactError, match="no permission"), disk_errors(Path("x")):
        raise OSError(code, "injected")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_other_errors_of_the_system_name_the_file(code: int) -> None:
    with pytest.raises(ArtifactError, match="cannot write x: injected"), disk_errors(Path("x")):
        raise OSError(code, "injected")


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOTDIR])
def test_what_is_in_the_place_of_a_file_is_for_the_caller(code: int) -> None:
    with pytest.raises((FileExistsError, NotADirectoryError)), disk_errors(Path("x")):
        raise OSError(code, "injected")


def test_a_place_that_is_no_place_for_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "f", tmp_path / "file" / "f", tmp_path):
        with pytest.raises(ArtifactError, match="cannot write"):
            write_file(path, b"x")


def test_disk_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_free_disk(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(MissingHardware, match="are needed"):
        require_free_disk(tmp_path / "not" / "yet" / "there", 2**62)
