"""Locks: one process at a time, a message for who waits, and nothing left by a process that is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from queue import Queue

import pytest

from sdopt import progress
from sdopt.disk.locks import lock_open_file, locked

HOLD = """
import sys, time
from pathlib import Path
from sdopt.disk.locks import lock_open_file, locked
path = Path(sys.argv[2])
if sys.argv[1] == "file":
    file = path.open("rb")
    lock_open_file(file.fileno(), shared=True)
else:
    lock = locked(path)
    lock.__enter__()
print("held", flush=True)
time.sleep(600)
"""


def hold(kind: str, path: Path) -> subprocess.Popen[str]:
    """A process that has the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, kind, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Queue[str]:
    told: Queue[str] = Queue()
    monkeypatch.setattr(progress, "update", lambda label, share: told.put(label))
    return told


def test_a_second_process_waits_and_says_so_until_the_first_is_killed(tmp_path: Path, messages: Queue[str]) -> None:
    path = tmp_path / "locks" / "a"
    holder = hold("path", path)
    entered = threading.Event()

    def enter() -> None:
        with locked(path, waiting="waiting for another"):
            entered.set()

    waiter = threading.Thread(target=enter)
    waiter.start()
    assert messages.get(timeout=60) == "waiting for another"
    assert not entered.wait(0.2)
    end(holder)
    waiter.join(60)
    assert entered.is_set()


def test_a_free_lock_says_nothing_and_keeps_its_file(tmp_path: Path, messages: Queue[str]) -> None:
    path = tmp_path / "locks" / "a"
    for _ in range(2):
        with locked(path, waiting="waiting for another"):
            assert path.is_file()
    assert messages.empty()
    assert path.is_file()


def test_what_fails_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a"):
        raise KeyError
    with locked(tmp_path / "a"):
        pass


def test_readers_share_an_open_file_and_a_writer_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"kept")
    reader = hold("file", path)
    with path.open("r+b") as shared, path.open("r+b") as alone:
        lock_open_file(shared.fileno(), shared=True)
        shared.close()
        writer = threading.Thread(target=lock_open_file, args=(alone.fileno(),))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        end(reader)
        writer.join(60)
        assert not writer.is_alive()
    assert path.read_bytes() == b"kept"
