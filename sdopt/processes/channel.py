"""What parent and child say to each other: one JSON table on stdin, JSON lines on stdout, never a pickle.

Lines are `{"progress": [text, share]}`, then `{"value": …, "peak_rss_bytes": …}`, or `{"error": …, "message": …,
"hint": …}` with the name of a class of `sdopt.errors`, or `{"error": …, "message": …, "trace": …}` of any other class.
"""

from __future__ import annotations

import json
import signal
from typing import IO, Any

import sdopt.errors
from sdopt.errors import MissingHardware, SdoptError

_STDERR_SHOWN_CHARS = 4000
_KINDS = ({"progress"}, {"value", "peak_rss_bytes"}, {"error", "message", "hint"}, {"error", "message", "trace"})

JsonTable = dict[str, Any]


def send(channel: IO[str], message: JsonTable) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def read_message(line: str, name: str) -> JsonTable:
    """Raises `SdoptError` that quotes a line which is not a message."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict) or message.keys() not in _KINDS:
        raise SdoptError(f"{name} sent something that is not a message of the protocol: {line.strip()[:200]!r}")
    return message


def rebuild_error(name: str, message: JsonTable) -> SdoptError:
    """The child's error by the name of its class; any other name becomes an `SdoptError` that names the function.

    What the child did not expect is one sentence, and its stack trace a note of the exception.
    """
    if "trace" in message:
        said = " ".join(f"{message['error']}: {message['message']}".split()).removesuffix(":")
        error = SdoptError(
            f"sdopt did not expect this in {name}: {said}",
            hint="please report it, with what the same command shows after SDOPT_TRACE=1",
        )
        error.add_note(message["trace"])
        return error
    kind = getattr(sdopt.errors, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, SdoptError):
        return kind(message["message"], hint=message["hint"])
    return SdoptError(f"{name} failed: {message['message']}")


def describe_death(name: str, returncode: int, stderr: str) -> SdoptError:
    """What a child that ended without an answer died of; `returncode` is as in `subprocess`."""
    if returncode == -signal.SIGKILL:
        return MissingHardware(
            f"{name} was killed, most likely for lack of memory",
            hint="close other programs, or choose a smaller --size or --batch",
        )
    how = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    return SdoptError(f"{name} ended with {how}\n{stderr[-_STDERR_SHOWN_CHARS:]}")
