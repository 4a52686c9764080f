"""An in-memory session that computes with diffusers' and transformers' own modules, and a bundle folder
around it.

It holds its callers to the protocol: shapes as built, dtypes as in the spec.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

import sdopt
from sdopt.backends.protocol import MemoryUse, check_inputs
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ComponentRecord, FidelityRecord, GraphAudit, SourceRecord, Verdict
from sdopt.machine.machine_record import EnvironmentRecord  # fmt: skip
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.component import ComponentName, ComponentSpec, describe_component, vae_factor
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import DType, Precision
from sdopt.model.recipe import BuildRecipe, Dialect
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.model.task import Task, find_tasks
from sdopt.networks.modules import build_network
from sdopt.weights.to_torch import TORCH_DTYPES

# Tests run beside each other, and these networks are too small to share out.
torch.set_num_threads(1)

TINY_SHAPES = Path(sdopt.__file__).parent / "assets" / "tiny-shapes"
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@dataclass
class ReferenceSession:
    """A `Session` over a torch module; `runs` are the shapes of each run's first input."""

    spec: ComponentSpec
    extents: Mapping[str, Extent]
    module: torch.nn.Module
    profiles: tuple[Mapping[str, Extent], ...] = ()
    runs: list[tuple[int, ...]] = field(default_factory=list)
    closed: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        self.profiles = self.profiles or (self.extents,)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert not self.closed
        check_inputs(self.spec, self.extents, inputs, self.profiles)
        for tensor in self.spec.inputs:
            assert inputs[tensor.name].dtype == TORCH_DTYPES[tensor.dtype]
            assert inputs[tensor.name].is_contiguous()
        self.runs.append(tuple(inputs[self.spec.inputs[0].name].shape))
        with torch.no_grad():
            outputs = self.module(*(inputs[tensor.name] for tensor in self.spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {t.name: value.to(TORCH_DTYPES[t.dtype]) for t, value in zip(self.spec.outputs, outputs, strict=True)}

    def memory(self) -> MemoryUse:
        return MemoryUse(0, 0, 0)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class ReferenceBundle:
    """A bundle's folder without graphs, its manifest, and its sessions."""

    folder: Path
    manifest: BundleManifest
    sessions: dict[ComponentName, ReferenceSession]


def make_bundle(
    folder: Path,
    source: Path = TINY_SHAPES,
    *,
    family: Family = Family.SD1,
    prediction: Prediction = Prediction.EPSILON,
    inpainting: bool = False,
    profile: ShapeProfile | None = None,
    profiles: tuple[ShapeProfile, ...] = (),
) -> ReferenceBundle:
    """A bundle of a diffusers folder, with fp32 reference sessions. `profile` is 64x64 at batch 1 by default."""
    profiles = profiles or (profile or ShapeProfile.static(height_px=64, width_px=64),)
    factor = vae_factor(_config(source, "vae"))
    sessions: dict[ComponentName, ReferenceSession] = {}
    for name in ComponentName:
        part = "vae" if name.startswith("vae") else name.value
        if not (source / part).is_dir():
            continue
        config = _config(source, part)
        weights = {
            key: value.float()
            for key, value in load_file(source / part / f"{_WEIGHTS.get(part, 'model')}.safetensors").items()
        }
        module = build_network(name, config).requires_grad_(False)
        if not name.is_text_encoder:
            # As sdopt's reader does: an older or hand-written config leaves defaults out.
            config = json.loads(module.network.to_json_string())
        keys = {key.removeprefix("network.") for key in module.state_dict()}
        renamed = {_current_name(key, keys): value for key, value in weights.items()}
        module.network.load_state_dict({key: value for key, value in renamed.items() if key in keys})
        spec = describe_component(name, config, family, DType.FP32)
        tables = tuple(each.axis_extents(factor) for each in profiles)
        sessions[name] = ReferenceSession(spec, ShapeProfile.covering(profiles).axis_extents(factor), module, tables)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(
            {k: v.contiguous() for k, v in renamed.items() if k in keys},
            folder / name / "weights.safetensors",
        )
    for extra in ("scheduler", "tokenizer", "tokenizer_2"):
        if (source / extra).is_dir():
            shutil.copytree(source / extra, folder / extra)
    shutil.copy(source / "model_index.json", folder)
    tasks = find_tasks(family, 9 if inpainting else 4, 4)
    manifest = _manifest(folder.name, sessions, family, prediction, tasks, factor, profiles)
    return ReferenceBundle(folder, manifest, sessions)


def _current_name(key: str, known: set[str]) -> str:
    short = key.removeprefix("text_model.")
    return key if key in known or short not in known else short


def _config(source: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / part / "config.json").read_text())
    return config


def _manifest(
    name: str,
    sessions: Mapping[ComponentName, ReferenceSession],
    family: Family,
    prediction: Prediction,
    tasks: tuple[Task, ...],
    pixels_per_latent: int,
    profiles: tuple[ShapeProfile, ...],
) -> BundleManifest:
    audit = GraphAudit(opset=23, nodes=1, attention_nodes=0, attention_layers=0)
    return BundleManifest(
        name=name,
        created_utc="2026-01-01T00:00:00Z",
        family=family,
        prediction=prediction,
        tasks=tasks,
        pixels_per_latent=pixels_per_latent,
        source=SourceRecord(kind="diffusers", location="tiny", digest="ab" * 32),
        recipe=BuildRecipe(),
        profile=ShapeProfile.covering(profiles),
        profiles=profiles,
        dialect=Dialect.NATIVE_ATTENTION,
        components={
            name: ComponentRecord(
                spec=session.spec,
                precision=Precision.FP32,
                backend=TorchSettings(),
                architecture="0",
                weights_key="0",
                audit=audit,
            )
            for name, session in sessions.items()
        },
        files={},
        fidelity=FidelityRecord(verdict=Verdict.NOT_VERIFIED, reason="a test"),
        environment=EnvironmentRecord(sdopt="0", python="3", system="", processor="", cpu_features=(), libraries={}),
    )
