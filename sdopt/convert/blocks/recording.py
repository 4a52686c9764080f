"""What every network of a pipeline is given and gives while it draws: noted call by call, written, read again.

A file has `{component}.{call:03d}.in.{tensor}` and `{component}.{call:03d}.out.{tensor}`; calls count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.backends.protocol import Session
from sdopt.backends.wrapped_session import WrappedSession
from sdopt.errors import CalibrationError
from sdopt.model.component import ComponentName

if TYPE_CHECKING:
    from torch import Tensor

Tell = Callable[[ComponentName, int], None]
"""Called after each call of a network with its name and the number of its calls so far."""


@dataclass(frozen=True)
class Call:
    """One call of a network: its inputs and outputs by name, on the CPU."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class Recorder:
    """Wraps the sessions of a pipeline, and keeps what passes through them between `begin` and `take`."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._calls: dict[ComponentName, int] = {}
        self._prompt = ""
        self._tell: Tell = _silent

    def wrap(self, session: Session) -> Session:
        """The session, with each run noted."""
        return RecordedSession(session, self)

    def begin(self, prompt: str, tell: Tell) -> None:
        """Start anew. The prompt is what errors name."""
        self._tensors, self._calls, self._prompt, self._tell = {}, {}, prompt, tell

    def take(self) -> dict[str, Tensor]:
        """Every tensor since `begin`, under the name that it has in the file."""
        return self._tensors

    def count(self, name: ComponentName) -> int:
        return self._calls.get(name, 0)

    def note(self, name: ComponentName, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Keep copies of one call's tensors. Raises `CalibrationError` for NaN and infinity."""
        call = self.count(name)
        for way, tensors in (("in", inputs), ("out", outputs)):
            for key, value in tensors.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise self._not_finite(name, call, key, way)
                # A copy: pipelines change latents in place, and safetensors takes no two tensors of one memory.
                self._tensors[f"{name}.{call:03d}.{way}.{key}"] = value.detach().cpu().contiguous().clone()
        self._calls[name] = call + 1
        self._tell(name, call + 1)

    def _not_finite(self, name: ComponentName, call: int, tensor: str, way: str) -> CalibrationError:
        verb = "is given" if way == "in" else "gives"
        when = "step" if name is ComponentName.UNET else "call"
        return CalibrationError(
            f"{name} {verb} NaN or infinite numbers ({tensor}) in {when} {call + 1} of drawing {self._prompt!r}",
            hint="torch computes so in fp32: the checkpoint is damaged, or a merge of it went wrong",
        )


def _silent(name: ComponentName, calls: int) -> None:
    del name, calls


class RecordedSession(WrappedSession):
    """A session whose runs a recorder notes."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        super().__init__(session)
        self._recorder = recorder

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.inner.run(inputs)
        self._recorder.note(self.spec.name, inputs, outputs)
        return outputs


def read_calls(path: Path, name: ComponentName) -> Iterator[Call]:
    """The calls of one network in a recorded file, in their order, read one at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys: dict[int, list[tuple[str, str]]] = {}
        for key in file.keys():  # noqa: SIM118 - it is not a dict
            component, _, rest = key.partition(".")
            if component == name:
                number, way, tensor = rest.split(".", 2)
                keys.setdefault(int(number), []).append((way, tensor))
        for number in sorted(keys):
            read = {pair: file.get_tensor(f"{name}.{number:03d}.{pair[0]}.{pair[1]}") for pair in keys[number]}
            yield Call(
                {tensor: value for (way, tensor), value in read.items() if way == "in"},
                {tensor: value for (way, tensor), value in read.items() if way == "out"},
            )
