"""Measure a candidate's UNet alone, in this process: guided steps, for networks too large to draw with.

The entry of a child, as `measure.py`. Cold start is import, load and the first step; nothing is drawn.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt import progress
from sdopt.backends.protocol import Session
from sdopt.bench.case.report import Stage
from sdopt.bench.measure.clock import Clock
from sdopt.bench.measure.measure import (
    Milestone,
    describe_start,
    find_own_gpu,
    read_device_memory,
    record_steady,
    torch_peak_bytes,
    watch_memory,
)
from sdopt.bench.measure.steady import Effort, has_settled, time_calls, warm_up
from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import SdoptError
from sdopt.fidelity.candidate import parse_settings
from sdopt.model.backend_settings import BackendSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    import torch


def write_inputs(folder: Path, manifest: BundleManifest, path: Path) -> None:
    """Parity's seeded inputs of the UNet at the bundle's usual size, as one file for every candidate."""
    from safetensors.torch import save_file

    from sdopt.backends.component_files import component_files
    from sdopt.trace.seeded_inputs import make_inputs

    files = component_files(folder, manifest, ComponentName.UNET)
    inputs = make_inputs(files.spec, files.config, files.extents)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, path)


def measure_unet(arguments: JsonTable) -> JsonTable:
    """Run a candidate's UNet; the result is that of `sdopt.bench.measure.measure.measure`, without a scheduler's name.

    The scene's file of inputs is that of `write_inputs` and holds one guided step: its batch has both halves. Samples
    are under `Stage.UNET_STEP`, energy is that of a step, and the first picture is the first step.
    """
    settings = parse_settings(arguments["settings"])
    # What is not the candidate's own to load.
    importlib.import_module("sdopt.networks.modules" if isinstance(settings, TorchSettings) else "torch")
    imported = Milestone.reach()
    manifest = BundleManifest.model_validate_json(arguments["manifest"])
    label, effort = str(arguments["label"]), Effort(**arguments["effort"])
    gpu = find_own_gpu(manifest, settings)
    progress.update(f"{label}: opening", 0.0)
    clock = Clock()
    with watch_memory(gpu) as peak, open_unet(Path(arguments["folder"]), manifest, settings) as session:
        opened = Milestone.reach()
        step = _Step(clock, clock.wrap(session), Path(arguments["scene"]["inputs"]))
        step.run()
        drawn_ns = time.monotonic_ns()
        # The first may have compiled for a minute, and says nothing of the second.
        warm_up_ns = warm_up(step.run, (), 0, effort)
        uuid = None if gpu is None else gpu.uuid
        steady = time_calls(step.run, effort, uuid, lambda share: progress.update(f"{label}: timing", share))
        device_memory = read_device_memory([session])
    table = record_steady(steady, pictures=1)
    table["conditions"]["clock_steps"] = clock.steps_back
    return table | {
        "samples_ns": {Stage.UNET_STEP: [sample for sample in steady.samples_ns if sample]},
        "warm_up_ns": list(warm_up_ns),
        "settled": has_settled(warm_up_ns, effort),
        "device_memory": device_memory,
        "peak_device_bytes": peak.peak_bytes,
        "torch_peak_device_bytes": None if gpu is None else torch_peak_bytes(),
    } | describe_start(arguments["launched_ns"], imported, opened, drawn_ns)  # fmt: skip


class _Step:
    """One guided step, again and again, on inputs that lie where the engine computes."""

    def __init__(self, clock: Clock, session: Session, inputs: Path) -> None:
        from safetensors.torch import load_file

        from sdopt.weights.to_torch import TORCH_DTYPES

        values, spec = load_file(inputs), session.spec
        self._clock, self._session, self._checked = clock, session, False
        self._inputs = {
            tensor.name: values[tensor.name].to(session.device, TORCH_DTYPES[tensor.dtype]) for tensor in spec.inputs
        }

    def run(self) -> int:
        """Its time in ns; 0 where the clock went back."""
        outputs = self._session.run(self._inputs)
        if not self._checked:
            require_finite(outputs)
            self._checked = True
        return sum(self._clock.take().get(Stage.UNET_STEP, ()))


def require_finite(outputs: Mapping[str, torch.Tensor]) -> None:
    """Raise `SdoptError` for a UNet whose times say nothing, because it computes NaN."""
    for name, value in outputs.items():
        if not bool(value.isfinite().all()):
            raise SdoptError(f"the UNet's {name} has NaN or Inf in it", hint="sdopt check compares it with torch's")


@contextlib.contextmanager
def open_unet(folder: Path, manifest: BundleManifest, settings: BackendSettings | None) -> Iterator[Session]:
    """The bundle's UNet with `settings`, or as the manifest names it. Raises what the backends raise."""
    from sdopt.backends.component_files import component_files
    from sdopt.backends.open import open_session
    from sdopt.fidelity.origin import find_origin
    from sdopt.machine.environment import find_machine
    from sdopt.preflight.plan_choice import choose_plans

    name = ComponentName.UNET
    plans = choose_plans(folder, manifest, find_machine()) if settings is None else {}
    origin = find_origin(manifest) if isinstance(settings, TorchSettings) else {}
    files = component_files(folder, manifest, name, plans.get(name, ()), origin.get(name))
    with open_session(files, settings or manifest.require_component(name).backend) as session:
        yield session
