"""Runs in a child behind the pickle sandbox's audit hook, and says what got through. Light: it loads no
torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from sdopt.checkpoint.pickle_sandbox import leave_network, refuse_event
from sdopt.errors import UnsafeInputError


def try_to_escape(arguments: dict[str, str]) -> dict[str, object]:
    """`planted` is a file to write, `kept` one to read and to remove."""
    planted, kept = Path(arguments["planted"]), Path(arguments["kept"])
    leave_network()
    sys.addaudithook(refuse_event)
    escaped = []
    for name, attempt in {
        "system": lambda: os.system("true"),
        "popen": lambda: subprocess.run(["true"], check=False),
        "socket": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        "write": lambda: planted.write_text("x"),
        "remove": kept.unlink,
        "fork": os.fork,
    }.items():
        try:
            attempt()
            escaped.append(name)
        except UnsafeInputError:
            pass
    return {"escaped": escaped, "read": kept.read_text()}
