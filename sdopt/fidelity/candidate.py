"""A candidate: a bundle opened with the engines that its manifest names, or with torch on the same weights.

Both are assembled into the same pipeline, so scheduler, tokenizer and latents are shared, and only the
networks differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from sdopt.backends.probes import probe_backend
from sdopt.backends.protocol import Session
from sdopt.bundle.manifest import BundleManifest
from sdopt.model.backend_settings import BackendSettings, TorchSettings, needs_gpu
from sdopt.model.component import ComponentName
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.model.lora import LoraUse
from sdopt.weights.safetensors_header import TensorRef, read_header

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SCHEDULER = "ddim"
_SETTINGS: TypeAdapter[BackendSettings] = TypeAdapter(BackendSettings)


def dump_settings(settings: BackendSettings | None) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json")


def parse_settings(values: dict[str, Any] | None) -> BackendSettings | None:
    return None if values is None else _SETTINGS.validate_python(values)


def engines_use_gpu(manifest: BundleManifest) -> bool:
    """Whether the engines compute on a GPU: then torch, which they are held against, is to do so, too."""
    return any(needs_gpu(record.backend) for record in manifest.components.values())


def find_reference_device(manifest: BundleManifest) -> Literal["cpu", "cuda"]:
    """Where torch draws what the engines are judged by: on the GPU that they run on, where it is there."""
    if engines_use_gpu(manifest) and probe_backend(TorchSettings(device="cuda")).available:
        return "cuda"
    return "cpu"


def _same(session: Session) -> Session:
    return session


@contextlib.contextmanager
def open_candidate(
    folder: Path,
    manifest: BundleManifest,
    settings: BackendSettings | None,
    wrap: Callable[[Session], Session] = _same,
    loras: Sequence[LoraUse] = (),
) -> Iterator[DiffusionPipeline]:
    """Open every component with `settings`, or each with its own where it is None, and assemble the pipeline.

    The scheduler is DDIM, whatever the checkpoint's own: it is deterministic, calls the UNet once a step, fits every
    checkpoint, and does not amplify rounding, as PLMS does at ten steps.

    `wrap` is called on each session before the pipeline sees it. `loras` act on all that is drawn. Raises what the
    backends raise, and `AdapterError` or `UsageError` for LoRAs that the bundle does not take.
    """
    from sdopt.backends.component_files import component_files
    from sdopt.backends.open import open_session
    from sdopt.fidelity.origin import find_origin
    from sdopt.machine.environment import find_machine
    from sdopt.pipeline.assemble import assemble_pipeline
    from sdopt.preflight.plan_choice import choose_plans

    plans = choose_plans(folder, manifest, find_machine()) if settings is None else {}
    origin = find_origin(manifest) if isinstance(settings, TorchSettings) else {}
    with contextlib.ExitStack() as opened:
        sessions = {}
        for name, record in manifest.components.items():
            files = component_files(folder, manifest, name, plans.get(name, ()), origin.get(name))
            sessions[name] = opened.enter_context(open_session(files, settings or record.backend))
        if loras and isinstance(settings, TorchSettings):
            _add_to_weights(folder, sessions, origin, loras)
        sessions = {name: wrap(session) for name, session in sessions.items()}
        pipeline = assemble_pipeline(folder, manifest, sessions, scheduler=_SCHEDULER)
        pipeline.set_progress_bar_config(disable=True)
        if loras and not isinstance(settings, TorchSettings):
            from sdopt.fidelity.scene_loras import fill_slots

            fill_slots(pipeline, loras)
        for part in (pipeline.unet, pipeline.vae):
            # A picture with NaN is a verdict, not the end of the comparison.
            part.refuses_nonfinite = False
        yield pipeline


def _add_to_weights(
    folder: Path,
    sessions: Mapping[ComponentName, Session],
    origin: Mapping[ComponentName, Mapping[str, TensorRef]],
    loras: Sequence[LoraUse],
) -> None:
    from sdopt.backends.torch_eager import TorchSession
    from sdopt.fidelity.scene_loras import add_to_weights

    of_torch = {
        name: session for name, session in sessions.items() if name.takes_adapters and isinstance(session, TorchSession)
    }
    tensors = {name: origin.get(name) or read_header(folder / name / WEIGHTS_NAME).tensors for name in of_torch}
    add_to_weights(of_torch, tensors, loras)
