"""The calibration stage: the scales of a network's layers, from the inputs that it has on its own trajectories.

A child process runs the network of the checkpoint's tensors in torch fp32. What it has noted is kept beside the store
after each trajectory, until the scales are in the store.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from sdopt import progress
from sdopt.convert.blocks.recording import read_calls
from sdopt.convert.blocks.trajectories import Trajectories
from sdopt.convert.plan import ComponentPlan
from sdopt.disk.digest import digest_of
from sdopt.disk.store import Store
from sdopt.errors import ArtifactError, MissingDependency
from sdopt.model.component import ComponentName
from sdopt.model.quantization import CalibrationSettings
from sdopt.processes.call import call
from sdopt.processes.channel import JsonTable
from sdopt.weights.safetensors_header import TensorRef

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGE = "calibration"
SCALES_NAME = "scales.safetensors"
# Raise it when the way from trajectories to scales changes: nothing of before is used again.
_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """What the child needs, as it crosses to it in JSON. `inputs` are the network's inputs in their order."""

    key: str
    cache: Path
    name: ComponentName
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    inputs: tuple[str, ...]
    layers: tuple[str, ...]
    trajectories: tuple[Path, ...]
    settings: CalibrationSettings


_JOB = TypeAdapter(Job)


def calibrate(
    part: ComponentPlan, layers: Sequence[str], trajectories: Trajectories, settings: CalibrationSettings, store: Store,
    cache: Path,
) -> Path:  # fmt: skip
    """The file of the scales of the layers' inputs, from the store of `cache` or made.

    For each layer it holds `{layer}.input_amax`, fp32 [], and with SmoothQuant for each linear layer `{layer}.smooth`,
    fp32 [inputs]: see `sdopt.quantize.scales.LayerScales`. Raises `CalibrationError`, naming a layer without a scale.
    """
    key = _calibration_key(part, layers, trajectories, settings)
    if store.find(STAGE, key) is None:
        job = Job(
            key, cache, part.spec.name, dict(part.config), dict(part.tensors),
            tuple(tensor.name for tensor in part.spec.inputs), tuple(layers), trajectories.calibration, settings,
        )  # fmt: skip
        call(calibrate_in_child, _JOB.dump_python(job, mode="json"))
    entry = store.find(STAGE, key)
    if entry is None:
        raise ArtifactError("the scales vanished from the store while they were used", hint="run the command again")
    return entry / SCALES_NAME


def _calibration_key(
    part: ComponentPlan, layers: Sequence[str], trajectories: Trajectories, settings: CalibrationSettings
) -> str:
    try:
        libraries = {name: version(name) for name in ("torch", "diffusers", "nvidia-modelopt")}
    except PackageNotFoundError as error:
        raise MissingDependency.of("nvidia-modelopt", extra="quant") from error
    return digest_of(
        {
            "format": _FORMAT,
            "component": part.spec.name,
            "architecture": part.architecture,
            "weights": part.weights_key,
            "layers": sorted(layers),
            "trajectories": trajectories.digest,
            "scales": [settings.scales, settings.percentile if settings.scales == "percentile" else None],
            "smoothquant_alpha": settings.smoothquant_alpha,
            "libraries": libraries,
        }
    )


def calibrate_in_child(arguments: JsonTable) -> JsonTable:
    """Entry of the child process: run the network over the trajectories, and put its scales into the store."""
    import torch
    from safetensors.torch import save

    from sdopt.quantize.scales import collect_scales

    job = _JOB.validate_python(arguments)
    progress.update(f"opening {job.name} in torch", 0.0)
    samples = [functools.partial(_read_arguments, path, job.name, job.inputs) for path in job.trajectories]
    kept = job.cache / STAGE / job.key
    found = collect_scales(_open_network(job), job.layers, samples, job.settings, state=kept)
    tensors = {f"{layer}.input_amax": torch.tensor(scales.input_amax) for layer, scales in found.items()}
    tensors |= {f"{layer}.smooth": scales.smooth for layer, scales in found.items() if scales.smooth is not None}
    Store(job.cache).put(STAGE, job.key, {SCALES_NAME: save(tensors)})
    shutil.rmtree(kept, ignore_errors=True)
    return {}


def _open_network(job: Job) -> nn.Module:
    import torch
    from accelerate import init_empty_weights

    from sdopt.networks.modules import build_network
    from sdopt.weights.to_torch import load_weights

    with init_empty_weights(include_buffers=False):
        network = build_network(job.name, job.config)
    load_weights(network, job.tensors, torch.float32)
    return network


def _read_arguments(path: Path, name: ComponentName, inputs: Sequence[str]) -> list[tuple[Tensor, ...]]:
    """The arguments of the network's calls in one trajectory, in fp32 whatever they were recorded in."""
    calls = read_calls(path, name)
    values = ([call.inputs[tensor] for tensor in inputs] for call in calls)
    return [tuple(value.float() if value.is_floating_point() else value for value in each) for each in values]
