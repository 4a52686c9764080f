"""The children of one job: whoever gives a job up ends its children and no one else's."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Child(Protocol):
    """A process that can be ended; ending one that has ended does nothing."""

    def kill(self) -> None: ...


class Nursery:
    """The children that a job has started and that have not ended. Safe to use from several threads."""

    def __init__(self) -> None:
        self._living: set[Child] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def looks_after(self, child: Child) -> Iterator[None]:
        with self._lock:
            self._living.add(child)
        try:
            yield
        finally:
            with self._lock:
                self._living.discard(child)

    def kill(self) -> None:
        """End every child that runs now; the threads that wait for one get an error."""
        with self._lock:
            living = list(self._living)
        for child in living:
            child.kill()

    def __len__(self) -> int:
        return len(self._living)


# Of calls that belong to no job, as from a script that draws by itself.
_process_nursery = Nursery()
_current: contextvars.ContextVar[Nursery] = contextvars.ContextVar("nursery", default=_process_nursery)


def current_nursery() -> Nursery:
    """That of the job which runs in this context, or that of the process."""
    return _current.get()


@contextlib.contextmanager
def own_nursery() -> Iterator[Nursery]:
    """The body is a job of its own. Where it ends with an error, Ctrl-C included, its children end first.

    Threads see it where they are started by `submit_in_context`: a plain thread begins with an empty context.
    """
    nursery = Nursery()
    token = _current.set(nursery)
    try:
        yield nursery
    except BaseException:
        nursery.kill()
        raise
    finally:
        _current.reset(token)


def submit_in_context(
    pool: ThreadPoolExecutor, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> Future[R]:
    """Like `pool.submit`, with the nursery and the progress of the job that asks."""
    context = contextvars.copy_context()
    return pool.submit(lambda: context.run(function, *args, **kwargs))
