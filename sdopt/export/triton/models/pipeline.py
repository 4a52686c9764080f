"""The pipeline model of a Triton repository: prompts in, pictures out, the networks asked through Triton itself."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from .drawing import Drawer, Request, Tensors, make_noise
from .schedules import Floats

_SEED_LIMIT = 2**63
_TEXT_LIMIT = 20_000


class TritonPythonModel:
    def initialize(self, args: dict[str, Any]) -> None:
        del args
        folder = Path(__file__).parent
        settings = json.loads((folder / "pipeline.json").read_bytes())
        self._drawer = Drawer(settings, folder, run_network)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            pictures = self._drawer.draw(read_request(request, self._drawer.settings))
        except ValueError as error:
            refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        return pb_utils.InferenceResponse([pb_utils.Tensor("generated_image", pictures)])


def run_network(model: str, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
    """One run of another model of the repository. Raises `TritonModelException` with that model's message."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
        # An engine on a GPU would else leave its output there, where numpy cannot read it.
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def read_request(request: Any, settings: Mapping[str, Any]) -> Request:
    """The tensors of a request, with defaults for those that it lacks. Raises `ValueError` naming the bad one."""
    prompts = _read_texts(request, "prompt")
    count, most = len(prompts), settings["pictures_limit"]
    if not 1 <= count <= most:
        raise ValueError(f"prompt: 1 to {most} texts make a request, not {count}")
    negatives = _read_texts(request, "negative_prompt")
    scale = float(_read_number(request, "guidance_scale", settings["defaults"]["guidance_scale"]))
    if not 0 <= scale <= 100:
        raise ValueError(f"guidance_scale must be 0 to 100, not {scale}")
    return Request(
        prompts=prompts,
        negatives=_repeat(negatives, count, "negative_prompt") if negatives else None,
        noise=_read_noise(request, count, settings["latents"]),
        steps=int(_read_number(request, "steps", settings["defaults"]["steps"])),
        guidance_scale=scale,
    )


def _read_noise(request: Any, count: int, shape: list[int]) -> Floats:
    """The request's own latents, else noise of its seeds; one seed is the first picture's, and counts on from there."""
    given = _read(request, "latents")
    if given is not None:
        if given.shape != (count, *shape):
            raise ValueError(f"latents must have the shape {[count, *shape]}, not {list(given.shape)}")
        if not np.isfinite(given).all():
            raise ValueError("latents must be finite numbers")
        return np.asarray(given, np.float32)
    seeds = _read(request, "seed")
    if seeds is None:
        seeds = np.asarray([secrets.randbits(32)])
    numbers = [int(seed) for seed in seeds.flatten()]
    if len(numbers) == 1:
        numbers = [numbers[0] + i for i in range(count)]
    if len(numbers) != count or not all(0 <= number < _SEED_LIMIT for number in numbers):
        raise ValueError("seed: one number of 0 to 2^63 - 1, or one for each prompt")
    return make_noise(numbers, shape)


def _read_texts(request: Any, name: str) -> tuple[str, ...]:
    values = _read(request, name)
    if values is None:
        return ()
    try:
        texts = tuple(value.decode("utf-8") for value in values.flatten())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8") from error
    if any(len(text) > _TEXT_LIMIT for text in texts):
        raise ValueError(f"{name} is longer than {_TEXT_LIMIT} characters")
    return texts


def _read_number(request: Any, name: str, default: float) -> Any:
    value = _read(request, name)
    if value is None:
        return default
    if value.size != 1:
        raise ValueError(f"{name} must be one number, not {value.size}")
    return value.flatten()[0]


def _repeat(texts: tuple[str, ...], count: int, name: str) -> tuple[str, ...]:
    if len(texts) == 1:
        return texts * count
    if len(texts) != count:
        raise ValueError(f"{name}: one text, or one for each of the {count} prompts, not {len(texts)}")
    return texts


def _read(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
