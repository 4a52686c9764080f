"""Progress: silent by default, a line where there is no terminal, a bar where there is one."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from sdopt import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_shown_unless_somebody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    progress.update("work", 0.5)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_is_a_line_for_each_work_and_one_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress.shown_on_stderr():
        for step in range(100):
            progress.update("copying", step / 100)
            clock[0] += 0.5
        progress.update("tracing", 0.0)
    out, err = capsys.readouterr()
    assert out == "", "stdout is for results"
    assert err.splitlines() == [
        "copying …", "copying … 20%", "copying … 40%", "copying … 60%", "copying … 80%", "tracing …",
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "shown"), [(-1.0, 0.0), (0.25, 0.25), (7.0, 1.0), (float("nan"), 0.0)])
def test_shares_stay_between_nothing_and_all(given: float, shown: float) -> None:
    seen: list[float] = []
    with progress.shown_by(lambda _, share: seen.append(share)):
        progress.update("x", given)
    assert seen == [shown]


def test_who_showed_before_shows_again() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with progress.shown_by(lambda text, _: outer.append(text)):
        with contextlib.suppress(ZeroDivisionError), progress.shown_by(lambda text, _: inner.append(text)):
            progress.update("1", 0)
            raise ZeroDivisionError
        progress.update("2", 0)
    progress.update("3", 0)
    assert (outer, inner) == (["2"], ["1"])


def test_on_a_terminal_there_is_a_bar() -> None:
    code = (
        "from sdopt import progress\n"
        "with progress.shown_on_stderr():\n"
        "    progress.update('copying [unet]', 0.5)\n"
        "    progress.update('copying [unet]', 1.0)\n"
    )
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stderr=slave,
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how a terminal without a writer says its end
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert done.stdout == b""
    assert b"copying" in shown
    assert "━".encode() in shown
