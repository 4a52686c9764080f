"""A process that has imported the heavy libraries once, and forks for each call: 0.1 s instead of 7 s for a child.

It only imports. What it must never do, or every child inherits it broken: compute with torch (OpenMP's threads do not
live through a fork), touch CUDA, open files. It ends when its socket closes, which happens however its parent ends.

A request is one datagram with four descriptors: stdin, stdout and stderr of the child, and a socket on which the zygote
sends the child's pid with a pidfd, and later its wait status. What to call comes on the child's stdin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import warnings
from collections.abc import Iterable
from typing import NoReturn

from sdopt.processes.channel import send
from sdopt.processes.child import answer, die_with_parent, limit_memory, open_channel

# By name: this room knows nothing of those above it.
PRELOADED = (
    "sdopt.pipeline.load", "sdopt.trace.trace", "sdopt.trace.reference", "sdopt.networks.built_shapes",
    "sdopt.fidelity.drawings", "onnxscript", "onnx",
)  # fmt: skip
# While nothing is asked: what only some children need, and late.
PRELOADED_LATER = ("torchmetrics.functional.image",)
# The exit code of a zygote whose children could not use the GPU.
CANNOT_FORK = 75
# Of 32 and 64 bits each: a datagram is a few words.
_REQUEST_BYTES = 64


def preload(names: Iterable[str] = PRELOADED) -> None:
    for name in names:
        # What fails here fails again in the child that needs it, and is told there.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of a child touches these pages, so they stay shared


def spoils_cuda() -> bool:
    """Whether children of this process would be refused by CUDA, because something here has asked it for its devices.

    torch tells that to the child alone ("Cannot re-initialize CUDA in forked subprocess"), so one is asked.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    pid = os.fork()
    if pid == 0:
        code = 1  # also where it raises: the child must not live on as a second zygote
        try:
            code = int(torch.cuda._is_in_bad_fork())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def serve(control: socket.socket) -> None:
    """Fork for each request until the parent is gone, and then end what still runs."""
    living: dict[int, tuple[int, socket.socket]] = {}
    later = list(PRELOADED_LATER)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            events = selector.select(0 if later and living else None)
            if not events:
                preload([later.pop()])
            for key, _ in events:
                if key.fileobj is control:
                    message, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 4)
                    if not message:
                        _end_all(living)
                        return
                    others = [control, *(status for _, status in living.values())]
                    pid, pidfd, status = _fork(descriptors, others, selector)
                    living[pidfd] = (pid, status)
                    selector.register(pidfd, selectors.EVENT_READ)
                else:
                    pidfd = int(key.fd)
                    selector.unregister(pidfd)
                    _report_end(pidfd, *living.pop(pidfd))


def _fork(
    descriptors: list[int], others: list[socket.socket], selector: selectors.BaseSelector
) -> tuple[int, int, socket.socket]:
    zygote = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads: those here are OpenBLAS's, which has handlers for a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _live(descriptors, others, selector, zygote)
    status = socket.socket(fileno=descriptors.pop())
    for descriptor in descriptors:
        os.close(descriptor)
    pidfd = os.pidfd_open(pid)
    with contextlib.suppress(OSError):  # the parent may be gone, which `serve` sees next
        socket.send_fds(status, [str(pid).encode()], [pidfd])
    return pid, pidfd, status


def _live(
    descriptors: list[int], others: list[socket.socket], selector: selectors.BaseSelector, zygote: int
) -> NoReturn:
    """The child's life. It leaves without Python's farewell: handlers registered before the fork are the zygote's."""
    code = 1
    try:
        selector.close()
        for other in others:
            other.close()
        for place, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, place)
        for descriptor in descriptors:
            os.close(descriptor)
        if die_with_parent(zygote):
            code = _answer()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _answer() -> int:
    request = json.loads(os.fdopen(0, encoding="utf-8", closefd=False).read())
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:] = request["path"]
    limit_memory(request["memory_limit_bytes"])
    with open_channel() as channel:
        try:
            message = answer(request["target"], request["arguments"], channel)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        send(channel, message)
    return 0


def _report_end(pidfd: int, pid: int, status: socket.socket) -> None:
    _, wait_status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        status.send(str(os.waitstatus_to_exitcode(wait_status)).encode())
    status.close()
    os.close(pidfd)


def _end_all(living: dict[int, tuple[int, socket.socket]]) -> None:
    for pidfd in living:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def main(descriptor: int) -> int:
    # Ctrl-C reaches the whole terminal group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries ask torch for a GPU while they are imported: by NVML, which leaves CUDA as it is.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    preload()
    if spoils_cuda():
        return CANNOT_FORK
    serve(socket.socket(fileno=descriptor))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
