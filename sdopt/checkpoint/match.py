"""The tensors of a file against the names and shapes that its config asks for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from sdopt.checkpoint.checkpoint import ComponentSource
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config
from sdopt.weights.safetensors_header import TensorRef, quantised_error

_SHOWN = 5
# Attention of the VAE before diffusers 0.15.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")
# transformers 4 saved CLIP's text model with this prefix, 5 does not; with a projection both do.
_TEXT_PREFIX = "text_model."
# Counted by the libraries themselves today, saved by them once.
_NO_WEIGHT = "position_ids"


def match_component(
    name: ComponentName, config: Config, tensors: Mapping[str, TensorRef], *, where: str
) -> ComponentSource:
    """A component whose tensors are exactly those that its config asks for, by today's names and shapes.

    `where` names the file or folder in messages. Raises `CheckpointError` that names up to five tensors that
    are missing, left over, of another shape or of no float type.
    """
    from sdopt.checkpoint.expected import expect_component

    try:
        expected = expect_component(name, config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    weights = {key: ref for key, ref in tensors.items() if not key.endswith(_NO_WEIGHT)}
    found = {_modern_name(key, expected.shapes): ref for key, ref in weights.items()}
    if len(found) < len(weights):
        raise CheckpointError(f"{where}: the {name} has tensors under an old name and a new one at once")
    missing = expected.shapes.keys() - found.keys()
    if missing:
        raise CheckpointError(f"{where}: the {name} lacks {_list_names(missing)}", hint=_hint(name))
    extra = found.keys() - expected.shapes.keys()
    if extra:
        raise CheckpointError(
            f"{where}: the {name} has tensors that its config does not explain: {_list_names(extra)}",
            hint=_hint(name),
        )
    fitted = {key: _fit(key, found[key], shape, where) for key, shape in sorted(expected.shapes.items())}
    return ComponentSource(name, expected.config, fitted)


def _modern_name(key: str, expected: Mapping[str, object]) -> str:
    key = _OLD_ATTENTION_NAME.sub(lambda found: found[1] + _OLD_ATTENTION[found[2]] + found[3], key)
    if key in expected:
        return key
    for other in (key.removeprefix(_TEXT_PREFIX), _TEXT_PREFIX + key):
        if other in expected:
            return other
    return key


def _fit(key: str, ref: TensorRef, shape: tuple[int, ...], where: str) -> TensorRef:
    if not ref.dtype.is_float:
        raise quantised_error(where, key, str(ref.dtype))
    if ref.shape == shape:
        return ref
    # A 1x1 convolution and a linear layer have the same bytes.
    if _without_ones(ref.shape) == _without_ones(shape) and math.prod(ref.shape) == math.prod(shape):
        return dataclasses.replace(ref, shape=shape)
    raise CheckpointError(
        f"{where}: tensor {key!r} has the shape {list(ref.shape)}, and its config asks for {list(shape)}"
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _list_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{len(ordered)} tensor{'s' if len(ordered) > 1 else ''}: {', '.join(ordered[:_SHOWN])}{more}"


def _hint(name: ComponentName) -> str:
    vae = name in (ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER)
    return "the file may be incomplete: download it again" + (", or give another VAE with --vae" if vae else "")
