"""Prompts to what the UNet is given: weights on the states of text encoders, and other states as the steps go on.

`reading_prompts` makes the class of a pipeline do this in its own `encode_prompt` and `__call__`; what a prompt without
syntax is encoded to, bit for bit, is what diffusers makes of it. The tokens of a text come from `PromptTokenizer`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from sdopt.model.shape import CHUNK_TOKENS
from sdopt.pipeline.prompt import PromptTokenizer
from sdopt.pipeline.prompt_grammar import changes_between_steps
from sdopt.pipeline.prompt_reading import PromptText, ReadPrompt, read_prompt, refuse_adapters

_PROMPTS = ("prompt", "prompt_2")
_NEGATIVES = ("negative_prompt", "negative_prompt_2")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")

Encoded = tuple[torch.Tensor | None, ...]
"""What `encode_prompt` of diffusers gives: states and negative states (rows, tokens, width), for SDXL also the pooled
vectors of both (rows, width)."""


@functools.cache
def reading_prompts(kind: Any) -> Any:
    """The pipeline's class with prompts that are read as `prompt_grammar` says, all of one call in as many chunks.

    It keeps its name, by which `AutoPipelineFor….from_pipe` finds its relatives.
    """
    of_call, of_encode = inspect.signature(kind.__call__), inspect.signature(kind.encode_prompt)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = of_call.bind(self, *args, **kwargs)
        bound.apply_defaults()
        drawing = _Drawing(self, _steps_in(bound.arguments))
        if any(changes_between_steps(text) for name in (*_PROMPTS, *_NEGATIVES) for text in _texts_in(bound, name)):
            drawing.follow(bound.arguments)
        token = _drawing.set(drawing)
        try:
            return kind.__call__(*bound.args, **bound.kwargs)
        finally:
            _drawing.reset(token)

    @functools.wraps(kind.encode_prompt)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawing = _drawing.get()
        own = drawing if drawing is not None and drawing.pipe is self else None
        bound = of_encode.bind(self, *args, **kwargs)
        steps = _encode_steps(kind, self, bound, None if own is None else own.steps)
        if own is not None:
            own.encoded = steps
        return steps[0]

    def maybe_convert_prompt(self: Any, prompt: Any, tokenizer: Any) -> Any:
        """The prompt: its tokenizer knows the words that stand for several tokens."""
        del self, tokenizer
        return prompt

    members = {"__call__": call, "encode_prompt": encode_prompt, "maybe_convert_prompt": maybe_convert_prompt,
               "__module__": kind.__module__, "__doc__": kind.__doc__}  # fmt: skip
    return type(kind.__name__, (kind,), members)


def reads_prompts(pipe: Any) -> bool:
    """Whether a pipeline's prompts go through the tokenizers of this package."""
    return bool(_tokenizers_of(pipe))


def count_chunks(pipe: Any, prompts: Iterable[str], steps: int) -> int:
    """How many chunks a pipeline encodes these prompts in, so that all of them have one length at all steps."""
    return _count_chunks(pipe, [read_prompt(prompt, steps, words=_words_of(pipe)) for prompt in prompts])


def _count_chunks(pipe: Any, prompts: Sequence[ReadPrompt]) -> int:
    texts = dict.fromkeys(text for prompt in prompts for text in prompt.texts)
    return max((tokenizer.count_chunks(texts) for tokenizer in _tokenizers_of(pipe)), default=1)


def _tokenizers_of(pipe: Any) -> list[PromptTokenizer]:
    parts = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [part for part in parts if isinstance(part, PromptTokenizer)]


def _words_of(pipe: Any) -> list[str]:
    """Names of the words that textual inversion has added."""
    return list(getattr(getattr(pipe.unet, "words", None), "words", ()))


def _steps_in(given: Mapping[str, Any]) -> int:
    own = next((given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None), None)
    return int(given["num_inference_steps"]) if own is None else len(own)


def _texts_in(bound: inspect.BoundArguments, name: str) -> Sequence[str]:
    value = bound.arguments.get(name)
    return [value] if isinstance(value, str) else value or ()


def _encode_steps(kind: Any, pipe: Any, bound: inspect.BoundArguments, steps: int | None) -> Sequence[Encoded]:
    """What `encode_prompt` gives at each step; once, where all steps have the same. Each text is encoded once."""
    given = bound.arguments
    prompts = {
        name: [read_prompt(text, steps, words=_words_of(pipe)) for text in _texts_in(bound, name)]
        for name in (*_PROMPTS, *_NEGATIVES)
        # Of an empty second text diffusers takes the first.
        if given.get(name) or (given.get(name) is not None and not name.endswith("_2"))
    }
    for prompt in (each for row in prompts.values() for each in row):
        refuse_adapters(prompt.adapters)
    embeds = (given[name].shape[1] // CHUNK_TOKENS for name in _EMBEDS if given.get(name) is not None)
    chunks = max(_count_chunks(pipe, [each for row in prompts.values() for each in row]), *embeds, 1)
    changes = any(len(each.texts) > 1 for row in prompts.values() for each in row)
    known: dict[tuple[tuple[PromptText, ...], ...], Encoded] = {}
    result: list[Encoded] = []
    for step in range((steps or 1) if changes else 1):
        texts = {name: [each.at(step).in_chunks(chunks) for each in row] for name, row in prompts.items()}
        key = tuple(map(tuple, texts.values()))
        if key not in known:
            known[key] = _encode(kind, pipe, bound, texts)
        result.append(known[key])
    return result


def _encode(kind: Any, pipe: Any, bound: inspect.BoundArguments, texts: Mapping[str, list[PromptText]]) -> Encoded:
    arguments = dict(bound.arguments)
    for name, row in texts.items():
        arguments[name] = row[0] if isinstance(arguments[name], str) else row
    own = inspect.BoundArguments(bound.signature, arguments)
    encoded = list(kind.encode_prompt(*own.args, **own.kwargs))
    for place, names in enumerate((_PROMPTS, _NEGATIVES)):
        if encoded[place] is not None and arguments.get(_EMBEDS[place]) is None and names[0] in texts:
            encoded[place] = _weigh(pipe, encoded[place], [texts.get(name, texts[names[0]]) for name in names])
    return tuple(encoded)


def _weigh(pipe: Any, states: torch.Tensor, texts: Sequence[Sequence[PromptText]]) -> torch.Tensor:
    """States (rows, tokens, width) with the weights of their tokens; `texts` are those of each text encoder in turn,
    of which there may be fewer, and whose states lie side by side.

    A1111's "Original" emphasis: states times weights, then times what gives the chunk its mean back; for each chunk of
    each row and each encoder by itself.
    """
    encoders = [part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None)) is not None]
    parts = []
    start = 0
    for encoder, tokenizer, row in zip(encoders, _tokenizers_of(pipe), texts, strict=False):
        weights = tokenizer.weights_of(row).to(states.device)
        width = int(encoder.config.hidden_size)
        part = states if len(encoders) == 1 else states[..., start : start + width]
        parts.append(emphasise(part, weights.repeat_interleave(states.shape[0] // len(row), dim=0)))
        start += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def emphasise(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One encoder's states (rows, tokens, width) under the weights (rows, tokens) of their tokens, fp32.

    Where the weights of a chunk are all 1, so is the quotient of its means, and its states stay bit for bit.
    """
    rows, _, width = states.shape
    chunks = states.reshape(rows, -1, CHUNK_TOKENS, width)
    factors = weights.reshape(rows, -1, CHUNK_TOKENS, 1)
    weighed = chunks * factors
    mean, new_mean = (part.mean(dim=(2, 3), keepdim=True) for part in (chunks, weighed))
    # States of a mean of exactly 0 have nothing to be given back.
    weighed = weighed * torch.where(new_mean == 0, 1.0, mean / new_mean)
    return weighed.flatten(1, 2)


@dataclass
class _Drawing:
    """A call of a pipeline whose prompts are drawn in `steps` steps, and what they are encoded to at each."""

    pipe: Any
    steps: int
    encoded: Sequence[Encoded] = field(default_factory=list)

    def follow(self, arguments: dict[str, Any]) -> None:
        """Make the callback of a call hand the loop what its next step is to see, after what the user's own does."""
        own = arguments.get("callback_on_step_end")
        if own is not None and hasattr(own, "tensor_inputs"):
            # Diffusers asks the callbacks of its own classes for the tensors that they want.
            arguments["callback_on_step_end_tensor_inputs"] = own.tensor_inputs

        def on_step_end(running: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            changed = tensors if own is None else own(running, index, timestep, tensors)
            before, after = (self._at(running, each) for each in (index, index + 1))
            return changed if before is after else {**changed, **_tensors_of(running, after)}

        arguments["callback_on_step_end"] = on_step_end

    def _at(self, running: Any, index: int) -> Encoded:
        """What a turn of the loop sees. A sampler of second order takes two turns for a step, one for the last; PLMS
        has one turn more than steps.
        """
        order = int(getattr(running.scheduler, "order", 1))
        extra = max(0, int(running.num_timesteps) - self.steps * order)
        return self.encoded[min(max(index - extra, 0) // order, len(self.encoded) - 1)]


def _tensors_of(running: Any, encoded: Encoded) -> dict[str, torch.Tensor]:
    """By the names of the loop's variables, in which a guided drawing has the negative rows before the others."""
    guided = bool(running.do_classifier_free_guidance)
    names = ("prompt_embeds", "add_text_embeds")
    pairs = zip(names, encoded[::2], encoded[1::2], strict=False)
    return {name: torch.cat([negative, own]) if guided else own for name, own, negative in pairs}  # type: ignore[list-item,misc]


_drawing: ContextVar[_Drawing | None] = ContextVar("drawing", default=None)
