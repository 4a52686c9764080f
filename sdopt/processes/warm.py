"""The parent's side of the zygote: start it at the first need, ask it for children, forget it when it is gone."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO

from sdopt.processes.channel import JsonTable
from sdopt.processes.zygote import CANNOT_FORK

# Read by libraries when they are imported, which the zygote did with the values of its start.
_READ_AT_IMPORT = (
    "OMP_", "MKL_", "KMP_", "OPENBLAS_", "GOMP_", "ONEDNN_", "DNNL_", "CUDA_", "TORCH", "PYTORCH_", "PYTHON",
    "LD_", "GLIBC_TUNABLES", "MALLOC_", "HF_", "TRANSFORMERS_", "DIFFUSERS_", "OV_", "ORT_",
)  # fmt: skip


def can_fork_warm() -> bool:
    """Linux alone: macOS forks unsafely once its own libraries have started, and has no pidfd.

    Not where a zygote of this process has found that its children could not use the GPU.
    """
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and not _spoils_cuda


class WarmChild:
    """A forked child, as much like `subprocess.Popen` as its caller needs."""

    def __init__(self, stdin: IO[str], stdout: IO[str], status: socket.socket) -> None:
        """Raises `EOFError` where the zygote ended before it forked."""
        self.stdin, self.stdout, self._status = stdin, stdout, status
        pid, descriptors, _, _ = socket.recv_fds(status, 32, 1)
        if not pid or not descriptors:
            raise EOFError
        self.pid, (self._pidfd,) = int(pid), descriptors
        self.returncode: int | None = None

    def kill(self) -> None:
        if self.returncode is None:
            # By its descriptor: the number may be another process's by now.
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, negative for a signal. A zygote that was killed has taken its children along."""
        if self.returncode is None:
            said = self._status.recv(32)
            self.returncode = int(said) if said else -signal.SIGKILL
            self._status.close()
            os.close(self._pidfd)
        return self.returncode


class Zygote:
    """The running zygote of this process. Safe to ask from several threads."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = _read_at_import(os.environ)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sdopt.processes.zygote", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip
        self._lock = threading.Lock()

    def lives(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def fits(self) -> bool:
        """Whether it was started with the settings that libraries read when they are imported."""
        return self._environment == _read_at_import(os.environ)

    def start(self, stderr: IO[str]) -> WarmChild:
        """A child that waits for its request on stdin. Raises `EOFError` or `OSError` where the zygote is gone."""
        stdin_read, stdin_write = os.pipe()
        stdout_read, stdout_write = os.pipe()
        status, theirs = socket.socketpair()
        given = [stdin_read, stdout_write, stderr.fileno(), theirs.fileno()]
        stdin = os.fdopen(stdin_write, "w", encoding="utf-8")
        stdout = os.fdopen(stdout_read, encoding="utf-8", errors="replace")
        try:
            with self._lock:
                socket.send_fds(self._control, [b"call"], given)
        except OSError:
            _close_all(stdin, stdout, status)
            raise
        finally:
            os.close(stdin_read)
            os.close(stdout_write)
            theirs.close()
        try:
            return WarmChild(stdin, stdout, status)
        except EOFError:
            _close_all(stdin, stdout, status)
            raise

    def close(self) -> None:
        """End it and all of its children."""
        self._control.close()
        self._process.wait()

    def forget(self) -> None:
        """In a forked copy of this process: it is the other one's."""
        self._control.close()
        self._process.returncode = 0  # or `Popen` warns that it still runs


def _close_all(stdin: IO[str], stdout: IO[str], status: socket.socket) -> None:
    for each in (stdin, stdout, status):
        with contextlib.suppress(OSError):
            each.close()


def write_request(stdin: IO[str], target: str, arguments: object, memory_limit_bytes: int, folder: str | None) -> None:
    """What a child reads on stdin: what to call, and where and with which surroundings."""
    request: JsonTable = {
        "target": target, "arguments": arguments, "memory_limit_bytes": memory_limit_bytes,
        "environment": dict(os.environ), "folder": folder or os.getcwd(), "path": sys.path,
    }  # fmt: skip
    json.dump(request, stdin)
    stdin.close()


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


_zygote: Zygote | None = None
_spoils_cuda = False
_starting = threading.Lock()


def warm_zygote() -> Zygote | None:
    """That of this process, started where there is none.

    None where a setting that libraries read at import changed, and where its children could not use the GPU.
    """
    global _zygote, _spoils_cuda
    with _starting:
        if _zygote is not None and not _zygote.lives():
            _zygote.close()
            _spoils_cuda = _spoils_cuda or _zygote.returncode == CANNOT_FORK
            _zygote = None
        if _spoils_cuda:
            return None
        if _zygote is None:
            _zygote = Zygote()
        return _zygote if _zygote.fits() else None


def end_zygote() -> None:
    """End the zygote of this process, if there is one, with its children."""
    global _zygote
    with _starting:
        if _zygote is not None:
            _zygote.close()
        _zygote = None


atexit.register(end_zygote)


def _forget_after_fork() -> None:
    global _zygote, _starting
    _starting = threading.Lock()
    if _zygote is not None:
        _zygote.forget()
    _zygote = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
