"""What a few-step model or LoRA is drawn with where a request leaves it open; what the request says is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdopt.bundle.manifest import BundleManifest, read_config, read_manifest
from sdopt.model.component import ComponentName
from sdopt.model.few_steps import FIELDS, Proposal, propose, propose_for_guidance_input
from sdopt.model.request import DrawRequest
from sdopt.model.samplers import SCHEDULERS
from sdopt.tasks.loras import LoraFinder, list_loras

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class ProposedRequest:
    """`told` says what was taken from a proposal and where that comes from; empty where nothing was."""

    request: DrawRequest
    told: str = ""


def take_proposals(
    folder: Path, requests: Sequence[DrawRequest], finder: LoraFinder, names: Mapping[str, str] = MappingProxyType({})
) -> list[ProposedRequest]:
    """The requests for the bundle in `folder`, with what its model and their LoRAs propose for fields that were not
    given. A LoRA comes before the model. `names` are what the user calls the fields.

    Raises what `LoraFinder.find` and `read_scheduler` raise.
    """
    from sdopt.pipeline.assemble import read_scheduler

    if all(request.model_fields_set.issuperset(FIELDS) for request in requests):
        return [ProposedRequest(request) for request in requests]
    own, manifest = read_scheduler(folder, None), read_manifest(folder)
    taken = []
    for request in requests:
        proposal = next(_list_proposals(folder, manifest, request, finder), None)
        if proposal is None:
            taken.append(ProposedRequest(request))
            continue
        left = [field for field in FIELDS if field not in request.model_fields_set]
        values = {field: getattr(proposal, field) for field in left}
        if "scheduler" in values and _draws_alike(own, proposal):
            del values["scheduler"]
        taken.append(ProposedRequest(request.model_copy(update=values), _tell(proposal, values, names)))
    return taken


def _list_proposals(
    folder: Path, manifest: BundleManifest, request: DrawRequest, finder: LoraFinder
) -> Iterator[Proposal]:
    for use in list_loras(request):
        if use.unet:
            yield from _of_file(finder.find(use.source))
    yield from (found for each in manifest.source.adapters if each.unet and (found := propose(each.name)))
    if ComponentName.UNET in manifest.components and read_config(folder, ComponentName.UNET).get("time_cond_proj_dim"):
        yield propose_for_guidance_input(manifest.name)
    location = PurePosixPath(manifest.source.location.replace("\\", "/"))
    stem = location.stem if manifest.source.kind == "single-file" else location.name
    yield from (found for name in (manifest.name, stem) if (found := propose(name)))


def _of_file(path: Path) -> Iterator[Proposal]:
    from sdopt.adapters.adapter_file import read_adapter_file

    file = read_adapter_file(path)
    yield from (found for name in (file.path.stem, file.title, file.alias) if (found := propose(name)))


def _draws_alike(own: SchedulerMixin, proposal: Proposal) -> bool:
    """Whether the model's own scheduler, which its maker chose, is what is proposed."""
    entry = SCHEDULERS[proposal.scheduler]
    config: Any = own.config
    return type(own).__name__ == entry.diffusers_class and (
        entry.spacing is None or config.get("timestep_spacing") == "trailing"
    )


def _tell(proposal: Proposal, values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    said = " ".join(
        f"{names.get(field, field)} {value:g}" if isinstance(value, float) else f"{names.get(field, field)} {value}"
        for field, value in values.items()
    )
    return f"{proposal.source} is {proposal.kind}, and is drawn with {said}" if said else ""
