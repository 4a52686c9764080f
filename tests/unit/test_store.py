"""The store: what was put is found, what is damaged is not, and many may put the same at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sdopt.disk import store as store_module
from sdopt.disk.store import Store, cache_root
from sdopt.errors import MissingHardware

KEY = "ab" * 32
FILES = {"model.onnx": b"graph" * 1000, "audit.json": b"{}"}


def read(folder: Path | None) -> dict[str, bytes] | None:
    return None if folder is None else {name: (folder / name).read_bytes() for name in FILES}


def test_what_was_put_is_found_under_its_stage_and_key_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("graph", KEY) is None
    assert read(store.put("graph", KEY, FILES)) == FILES
    assert read(Store(tmp_path).find("graph", KEY)) == FILES
    assert store.find("parity", KEY) is None
    assert store.find("graph", "ac" * 32) is None


def test_what_was_found_counts_as_reused_and_what_was_made_does_not(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.put("graph", KEY, FILES)
    assert first.find("graph", KEY)
    assert first.find("parity", KEY) is None
    Store(tmp_path).put("parity", KEY, FILES)  # by a child, for the parent that looked in vain
    assert first.find("parity", KEY)
    first.make("plan", KEY, lambda folder: _fill_one(folder))
    assert first.find("plan", KEY)
    assert first.reused == ()
    second = Store(tmp_path)
    assert second.find("graph", "ac" * 32) is None
    assert second.find("graph", KEY)
    second.make("plan", KEY, lambda folder: pytest.fail(f"made again in {folder}"))
    assert second.reused == ("graph", "plan")


def _fill_one(folder: Path) -> dict[str, str]:
    (folder / "engine").write_bytes(b"plan")
    return {"engine": hashlib.sha256(b"plan").hexdigest()}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed byte": lambda entry: (entry / "model.onnx").write_bytes(b"Graph" * 1000),
    "truncated": lambda entry: (entry / "model.onnx").write_bytes(b"graph"),
    "missing file": lambda entry: (entry / "audit.json").unlink(),
    "missing record": lambda entry: (entry / "entry.json").unlink(),
    "half a record": lambda entry: (entry / "entry.json").write_bytes(b'{"model.onnx": "a'),
    "empty record": lambda entry: (entry / "entry.json").write_bytes(b"{}"),
    "record is a list": lambda entry: (entry / "entry.json").write_bytes(b"[]"),
    "record of numbers": lambda entry: (entry / "entry.json").write_bytes(b'{"model.onnx": 1}'),
    "record is noise": lambda entry: (entry / "entry.json").write_bytes(bytes(range(256))),
    "folder for a file": lambda entry: ((entry / "audit.json").unlink(), (entry / "audit.json").mkdir()),
    "file for the entry": lambda entry: (shutil.rmtree(entry), entry.write_bytes(b"x")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_made_again(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    DAMAGE[kind](store.put("graph", KEY, FILES))
    assert store.find("graph", KEY) is None
    assert read(store.put("graph", KEY, FILES)) == FILES
    assert read(store.find("graph", KEY)) == FILES
    assert [path.name for path in (tmp_path / "store/graph/ab").iterdir()] == [KEY]


def test_a_whole_entry_is_kept_when_it_is_put_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = store.put("graph", KEY, FILES).stat().st_ino
    assert store.put("graph", KEY, FILES).stat().st_ino == before, "another process may be reading it"


def test_looking_for_an_entry_never_removes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and what follows from it, another process may have put the entry."""
    store = Store(tmp_path)
    read_bytes = Path.read_bytes

    def late(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        Store(tmp_path).put("graph", KEY, FILES)
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert store.find("graph", KEY) is None
    assert read(store.find("graph", KEY)) == FILES


def test_many_may_put_and_find_the_same(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                assert read(Store(tmp_path).put("graph", KEY, FILES)) == FILES
                assert read(Store(tmp_path).find("graph", KEY)) == FILES
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Three writes, an fsync of each and of their folder, the rename; then the fsync of the folder above.
STEPS_UNSEEN = 8


@pytest.mark.parametrize("after", range(STEPS_UNSEEN + 1))
def test_a_killed_put_leaves_nothing_half_made_to_be_seen(after: int, tmp_path: Path) -> None:
    """The process kills itself before the n-th step of a put; after the rename the entry is whole."""
    code = (
        "import os, signal, sys; from pathlib import Path; import sdopt.disk.store as s; n = 0\n"
        "def dying(real):\n"
        "    def call(*a, **k):\n"
        "        global n; n += 1\n"
        f"        os.kill(os.getpid(), signal.SIGKILL) if n > {after} else None\n"
        "        return real(*a, **k)\n"
        "    return call\n"
        "Path.write_bytes = dying(Path.write_bytes); Path.write_text = dying(Path.write_text)\n"
        "s.fsync_file = dying(s.fsync_file); s.fsync_folder = dying(s.fsync_folder)\n"
        "s._publish = dying(s._publish)\n"
        f"s.Store(Path(sys.argv[1])).put('graph', '{KEY}', {FILES!r})"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert read(Store(tmp_path).find("graph", KEY)) == (None if after < STEPS_UNSEEN else FILES)
    assert read(Store(tmp_path).put("graph", KEY, FILES)) == FILES


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MissingHardware, match="full"):
        Store(tmp_path).put("graph", KEY, FILES)
    monkeypatch.undo()
    assert list((tmp_path / "store/graph/ab").iterdir()) == []


def test_entries_say_the_digest_of_each_file(tmp_path: Path) -> None:
    entry = Store(tmp_path).put("graph", KEY, FILES)
    digests = json.loads((entry / store_module._ENTRY_NAME).read_bytes())
    assert digests == {name: store_module.hash_file(entry / name) for name in FILES}


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("SDOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "sdopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "sdopt"
