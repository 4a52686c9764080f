"""Requests that can share the engine's batch: neighbours that differ in prompts and seed only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from sdopt.tasks.prepare import PreparedRequest
from sdopt.tasks.words import active_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def group_requests(pipe: DiffusionPipeline, requests: Sequence[PreparedRequest]) -> Iterator[Sequence[PreparedRequest]]:
    """Cut the requests, in order, into groups that are drawn in one call, none larger than the engine's batch."""
    from sdopt.pipeline.prompt_encoding import count_chunks

    def settings(prepared: PreparedRequest) -> object:
        request = prepared.request
        shared = request.model_copy(update={"prompt": "", "negative_prompt": None, "seed": 0})
        # A prompt that is filled up to the length of its neighbour's draws another picture than alone.
        with active_words(pipe, prepared.words):
            chunks = count_chunks(pipe, [prepared.prompt, prepared.negative_prompt or ""], request.steps)
        return shared, prepared.loras, request.negative_prompt is None, chunks

    batch = _batch_of(pipe)
    for _, neighbours in groupby(requests, settings):
        group = list(neighbours)
        yield from (group[start : start + batch] for start in range(0, len(group), batch))


def _batch_of(pipe: DiffusionPipeline) -> int:
    bundle = getattr(pipe.unet, "bundle", None)
    return 1 if bundle is None else int(bundle.manifest.profile.batch.max)
