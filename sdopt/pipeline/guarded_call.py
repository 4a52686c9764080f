"""A drawing by a pipeline of diffusers: calls queue, arguments are checked first, and no NaN becomes a picture.

`guarded` makes the class of a pipeline do this in its own `__call__`, so it holds for `sdopt.load(folder)(prompt)` as
for `sdopt generate`. The queue belongs to the engines: pipelines that share them wait for each other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sdopt.errors import SdoptError, UsageError
from sdopt.pipeline.finite import require_finite_output
from sdopt.pipeline.step_limit import require_steps

_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
# Whose complaints about an argument are told as ours. An error that a callback of the user raises stays as it is.
_LIBRARIES = {"diffusers", "transformers", "tokenizers", "torch", "numpy", "scipy", "PIL", "torchsde"}


def guarded(kind: Any) -> Any:
    """The pipeline's class with guarded calls.

    It keeps its name, by which `AutoPipelineFor….from_pipe` finds its relatives.
    """
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs)
        given.apply_defaults()
        return guard_call(self, functools.partial(kind.__call__, self, *args, **kwargs), given.arguments)

    def components(self: Any) -> dict[str, Any]:
        """Its parts, with a copy of the scheduler: a pipeline made of them counts its steps by itself."""
        parts: dict[str, Any] = kind.components.fget(self)
        return {**parts, "scheduler": copy.deepcopy(parts["scheduler"])}

    members = {"__call__": call, "components": property(components), "__module__": kind.__module__,
               "__doc__": kind.__doc__}  # fmt: skip
    return type(kind.__name__, (kind,), members)


def guard_call(pipe: Any, run: Callable[[], Any], given: Mapping[str, Any]) -> Any:
    """Run a call of `pipe` whose arguments, with defaults, are `given`.

    Raises `UsageError` or `ShapeError` for arguments that cannot be drawn, before any network runs where that is
    possible, and `DrawingError` for a result that is not finite.
    """
    with drawing_turn(pipe):
        check_call(pipe, given)
        with library_errors():
            result = run()
        if getattr(pipe.unet, "refuses_nonfinite", True):
            require_finite_output(result)
        return result


def drawing_turn(pipe: Any) -> contextlib.AbstractContextManager[Any]:
    """The turn to draw with the engines of a pipeline; the thread that has it may take it again."""
    turn: contextlib.AbstractContextManager[Any] = getattr(pipe.unet, "turn", None) or contextlib.nullcontext()
    return turn


def check_call(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments that no pipeline can draw. Those that are not in `given` are not looked at."""
    if given.get("timesteps") is None and given.get("sigmas") is None and "num_inference_steps" in given:
        require_steps(pipe.scheduler, given["num_inference_steps"], name="num_inference_steps")
    _require_whole(given, "num_images_per_prompt", 1)
    _require_number(given, "guidance_scale")
    _require_number(given, "guidance_rescale")
    _check_clip_skip(pipe, given.get("clip_skip"))
    _check_prompts(given)
    _check_size(pipe, given)


def _require_whole(given: Mapping[str, Any], name: str, least: int) -> None:
    value = given.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise UsageError(f"{name} is {value!r}, and has to be a whole number from {least}")


def _require_number(given: Mapping[str, Any], name: str) -> None:
    value = given.get(name)
    if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
        raise UsageError(f"{name} is {value!r}, and has to be a number")


def _check_clip_skip(pipe: Any, skip: Any) -> None:
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    layers = [int(each.config.num_hidden_layers) for each in encoders if each is not None]
    most = min(layers, default=1) - 1
    if skip is not None and (isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most):
        raise UsageError(f"clip_skip is {skip!r}, and this model's text encoder takes whole numbers from 0 to {most}")


def _check_prompts(given: Mapping[str, Any]) -> None:
    for name in _PROMPTS:
        value = given.get(name)
        if isinstance(value, (list, tuple)) and not value:
            raise UsageError(f"{name} is an empty list", hint="give at least one text; an empty one is allowed")
        texts = value if isinstance(value, (list, tuple)) else [value]
        if wrong := next((text for text in texts if text is not None and not isinstance(text, str)), None):
            raise UsageError(f"{name} is {wrong!r}, and has to be a text or a list of texts")


def _check_size(pipe: Any, given: Mapping[str, Any]) -> None:
    """Before diffusers, which knows no profiles."""
    _require_whole(given, "width", 1)
    _require_whole(given, "height", 1)
    width_px, height_px = given.get("width"), given.get("height")
    bundle = getattr(pipe.unet, "bundle", None)
    if bundle is None or width_px is height_px is None:
        return
    usual = bundle.manifest.profile
    pipe.unet.check_size(width_px or usual.width_px.opt, height_px or usual.height_px.opt)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """What a library raises about an argument is a `UsageError` with its sentence, not a stack trace."""
    try:
        yield
    except (SdoptError, MemoryError):
        raise
    except Exception as error:
        if not _is_of_library(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the pipeline cannot draw this: {said}") from error


def _is_of_library(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES
