"""What TensorRT says while it works: kept, so that an error can quote it, and never printed."""

from __future__ import annotations

from typing import Any

_KEPT = 20


class Messages:
    """The errors of one parser, builder or runtime, oldest first."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def add(self, text: str) -> None:
        if len(self.errors) < _KEPT:
            self.errors.append(text)

    @property
    def text(self) -> str:
        return "; ".join(self.errors) or "it gave no reason"

    def say(self, *words: str) -> bool:
        """Whether an error has one of the words, in any case."""
        return any(word in error.lower() for error in self.errors for word in words)


def make_logger(library: Any, messages: Messages) -> Any:
    """An `ILogger` of this library that keeps errors in `messages` and drops the rest."""
    severities = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

    class Logger(library.ILogger):  # type: ignore[misc]  # the library is chosen at run time
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in severities:
                messages.add(msg)

    return Logger()
