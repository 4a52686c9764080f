"""Every error that sdopt raises on purpose. Third-party errors are mapped to these at the seam where they appear.

    SdoptError                     exit code 1   the work failed
    ├── UsageError                       2       the request makes no sense
    │   ├── RecipeError                          unknown key, bad value, impossible combination
    │   └── ShapeError                           a size, batch or prompt length that cannot be had
    ├── GateError                        3       the work was done, and the result is not good enough
    │   ├── ParityError                          a component differs from torch
    │   ├── AuditError                           a plan is not what was asked for: attention, precision, weights
    │   └── FidelityError                        the pictures differ from torch
    ├── UnsafeInputError                 4       the input could harm: pickle code, a path that leaves its folder
    ├── EnvironmentMissingError          5       this machine lacks something
    │   ├── MissingDependency                    a library; names the extra that brings it
    │   └── MissingHardware                      a processor feature, a GPU, memory, disk
    ├── CheckpointError                          the source is not a model that sdopt can read
    ├── AdapterError                             a LoRA is damaged, is not one, or does not fit the model or its slots
    ├── ArtifactError                            a file that sdopt wrote is damaged, foreign or of another version
    ├── CalibrationError                         a quantised layer gets no usable scale: NaN, 0 or infinity on the way
    ├── DrawingError                             a drawing gave NaN or infinity, and no picture
    ├── ExportError                              torch could not be turned into ONNX
    └── BackendError                             a runtime refused a graph, or failed while it ran

A message says what failed and on what; `hint` says what to do next.
"""

from __future__ import annotations


class SdoptError(Exception):
    """Base of all errors raised on purpose. `hint` is one sentence or command that mends it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def text_with_trace(error: SdoptError) -> str:
    """The message, and behind it the stack trace of the child that did not expect it, where there is one."""
    return "\n".join([error.message, *getattr(error, "__notes__", ())])


def _rebuild(kind: type[SdoptError], message: str, hint: str) -> SdoptError:
    return kind(message, hint=hint)


class UsageError(SdoptError):
    exit_code = 2


class RecipeError(UsageError):
    """An unknown key, a bad value or an impossible combination in a recipe or on the command line."""


class ShapeError(UsageError):
    """A size, batch or prompt length that the model or the engines cannot take."""


class GateError(SdoptError):
    exit_code = 3


class ParityError(GateError):
    """A component's engine differs from torch by more than its tolerance, or gives NaN or Inf."""


class AuditError(GateError):
    """A plan lacks weights, computes in another precision, or has attention that is not fused."""


class FidelityError(GateError):
    """The pictures of the engines differ from those of torch by more than the budget."""


class UnsafeInputError(SdoptError):
    exit_code = 4


class EnvironmentMissingError(SdoptError):
    exit_code = 5


class MissingDependency(EnvironmentMissingError):  # noqa: N818 - reads as what it is at the call site
    """A library is not installed. Build it with `MissingDependency.of("openvino", extra="cpu")`."""

    @classmethod
    def of(cls, library: str, *, extra: str) -> MissingDependency:
        return cls(f"{library} is not installed", hint=f"pip install 'sdopt[{extra}]'")


class MissingHardware(EnvironmentMissingError):  # noqa: N818
    """The machine lacks a processor feature, a GPU, memory or disk that the work needs."""


class CheckpointError(SdoptError):
    """The source is missing, damaged, or no Stable Diffusion model that sdopt can read."""


class AdapterError(SdoptError):
    """An adapter file is damaged, is not an adapter, or changes layers that the model or its slots do not have."""


class ArtifactError(SdoptError):
    """A bundle, graph or store entry is damaged, was not made by sdopt, or has another schema version."""


class CalibrationError(SdoptError):
    """A drawing gave NaN or infinity, or a layer's inputs give a scale that is 0 or infinite."""


class DrawingError(SdoptError):
    """A drawing gave NaN or infinity. Nothing is written: the picture would be black or white."""


class ExportError(SdoptError):
    """torch could not be traced to ONNX, or the graph does not fit its weights."""


class BackendError(SdoptError):
    """A runtime refused a graph, or failed while it ran."""
