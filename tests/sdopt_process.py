"""`sdopt` with words, as a process of its own that did not wait for its imports.

It is forked from this test process's zygote, and so is the zygote of its own: the same code as `sdopt` runs from then
on, in a process that can be killed and has an exit code, without 7 s of imports for each command and 7 s more for each
that asks for warm children. What tests the start itself, Ctrl-C or a kill takes the console script.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.processes import warm, zygote
from sdopt.processes.call import How, call_by_name
from sdopt.processes.channel import JsonTable
from sdopt.processes.child import die_with_parent

_TIMEOUT_S = 500.0


def run_sdopt(
    *words: str, cache: Path | None = None, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end. `cache` is its SDOPT_CACHE; no trace of Python may be shown."""
    surroundings = dict(environment or {}) | ({} if cache is None else {"SDOPT_CACHE": str(cache)})
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        arguments = {"words": words, "out": str(out), "err": str(err), "environment": surroundings}
        outcome = call_by_name(
            "tests.sdopt_process:run_in_child", arguments, how=How.WARM, timeout_s=_TIMEOUT_S,
            folder=None if folder is None else str(folder),
        )  # fmt: skip
        done = subprocess.CompletedProcess(
            ["sdopt", *words], int(outcome.value["code"]), out.read_text("utf-8", "replace"),
            err.read_text("utf-8", "replace"),
        )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_in_child(arguments: JsonTable) -> JsonTable:
    """The child's side. What it prints goes into files: stdout is the conversation with the test."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, path in ((1, arguments["out"]), (2, arguments["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(arguments["environment"])
    if warm.can_fork_warm() and not warm._read_at_import(arguments["environment"]):
        _adopt_zygote()
    sys.argv = ["sdopt", *arguments["words"]]
    from sdopt.cli.main import main

    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return {"code": code if isinstance(code, int) else int(code is not None)}


class _Forked:
    """As much of `subprocess.Popen` as the zygote's owner asks."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.poll() is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return int(self.returncode or 0)


class _Adopted(warm.Zygote):
    """One that was forked, and not started."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control, self._process, self._lock = control, _Forked(pid), threading.Lock()

    def fits(self) -> bool:
        return True  # its libraries were imported with the settings that this process was given


def _adopt_zygote() -> None:
    """Fork the zygote that `sdopt` would start: this process has imported what one imports, and nothing has run."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        control.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if die_with_parent(parent):
            zygote.serve(theirs)
        os._exit(0)
    theirs.close()
    warm._zygote = _Adopted(control, pid)
