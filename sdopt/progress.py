"""How far long work is. Anything may call `update`; who shows it, and how, is decided by whoever started the job.

Who shows it belongs to the context: two jobs in two threads of one process do not mix.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator

Sink = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

_LINE_EVERY_S = 10.0
# Less is not worth a word.
_WORTH_SAYING_S = 20.0


def _silent(text: str, share: float) -> None:
    del text, share


_sink: contextvars.ContextVar[Sink] = contextvars.ContextVar("sink", default=_silent)


def update(text: str, share: float) -> None:
    """Tell how far the work named `text` is: `share` of 0 to 1. Cheap; call it as often as is natural."""
    _sink.get()(text, min(1.0, max(0.0, share)))


def announce(text: str, left_s: float) -> None:
    """Begin work named `text`, and say how long all that is to come takes, where that is worth a word."""
    if left_s >= _WORTH_SAYING_S:
        left = f"{left_s / 60:.0f} minutes" if left_s >= 90 else f"{left_s:.0f} seconds"
        text = f"{text}; about {left} left, by an estimate"
    update(text, 0.0)


@contextlib.contextmanager
def shown_by(sink: Sink) -> Iterator[None]:
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextlib.contextmanager
def shown_on_stderr() -> Iterator[None]:
    """A bar on a terminal; elsewhere a line when the work changes and one every ten seconds."""
    if not sys.stderr.isatty():
        with shown_by(_lines()):
            yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        with shown_by(lambda text, share: bar.update(task, description=text, completed=share)):
            yield


def _lines() -> Sink:
    shown_text, shown_at = "", 0.0

    def show(text: str, share: float) -> None:
        nonlocal shown_text, shown_at
        now = time.monotonic()
        if text != shown_text or now - shown_at >= _LINE_EVERY_S:
            print(f"{text} … {share:.0%}" if share else f"{text} …", file=sys.stderr, flush=True)
            shown_text, shown_at = text, now

    return show
