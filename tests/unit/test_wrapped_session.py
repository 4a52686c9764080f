"""A wrapper adds to a session's runs and takes nothing from the session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.backends.protocol import MemoryUse, Session, ShowsKernels
from sdopt.backends.wrapped_session import WrappedSession
from sdopt.bench.measure.clock import Clock, TimedSession
from sdopt.convert.blocks.recording import RecordedSession, Recorder
from sdopt.model.component import ComponentName
from tests.reference_session import ReferenceSession, make_bundle


class SessionWithKernels(ReferenceSession):
    def integer_layers(self) -> int:
        return 7


@pytest.fixture
def plain(tmp_path: Path) -> ReferenceSession:
    return make_bundle(tmp_path / "bundle").sessions[ComponentName.VAE_DECODER]


def wrap_in_each(session: Session) -> list[Any]:
    wrapped = [WrappedSession(session), TimedSession(session, Clock()), RecordedSession(session, Recorder())]
    return [*wrapped, TimedSession(RecordedSession(session, Recorder()), Clock())]


def test_a_wrapper_shows_kernels_where_the_inner_session_does(plain: ReferenceSession) -> None:
    telling = SessionWithKernels(plain.spec, plain.extents, plain.module)
    for session in wrap_in_each(telling):
        assert isinstance(session, ShowsKernels)
        assert session.integer_layers() == 7
    assert not any(isinstance(session, ShowsKernels) for session in wrap_in_each(plain))


def test_a_wrapper_gives_what_the_inner_session_gives_and_closes_it(plain: ReferenceSession) -> None:
    inputs = {tensor.name: torch.randn(tensor.shape(plain.extents)) for tensor in plain.spec.inputs}
    expected = plain.run(inputs)
    for session in wrap_in_each(plain):
        outputs = session.run(inputs)
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)
        assert (session.spec, session.device, session.extents, session.profiles) == (
            plain.spec, plain.device, plain.extents, plain.profiles,
        )  # fmt: skip
        assert session.memory() == MemoryUse(0, 0, 0)
        with session:
            pass
        assert plain.closed
        plain.closed = False
