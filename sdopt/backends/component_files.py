"""A component of a bundle, as a backend opens it. Imports no runtime: children that open one engine start quickly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.manifest import BundleManifest, read_config
from sdopt.bundle.records import PlanRecord, SlotsRecord
from sdopt.model.component import ComponentName
from sdopt.weights.safetensors_header import TensorRef


def component_files(
    folder: Path, manifest: BundleManifest, name: ComponentName, plans: tuple[PlanRecord, ...] = (),
    origin: Mapping[str, TensorRef] | None = None,
) -> ComponentFiles:  # fmt: skip
    """One component of a bundle, as a backend opens it.

    `plans` are those of it that this machine runs, `origin` the checkpoint's tensors where torch opens a quantised one.
    """
    slots = manifest.components[name].slots
    slot_plans = tuple(plan for chosen in plans for plan in _like(chosen, slots))
    return ComponentFiles(
        folder=folder / name,
        spec=manifest.require_component(name).spec,
        slots=slots,
        slot_plans=slot_plans,
        config=read_config(folder, name),
        family=manifest.family,
        extents=manifest.extents,
        plans=plans,
        profiles=manifest.profile_extents,
        origin=origin,
        plan_digests={
            plan.file: manifest.files[plan.file].sha256 for plan in (*plans, *slot_plans) if plan.file in manifest.files
        },
    )


def _like(chosen: PlanRecord, slots: SlotsRecord | None) -> tuple[PlanRecord, ...]:
    """The plan with LoRA slots that runs where `chosen` does, at the same profile."""

    def place(plan: PlanRecord) -> tuple[object, ...]:
        return plan.flavour, plan.version, plan.generation, plan.system, plan.profile

    return () if slots is None else tuple(plan for plan in slots.plans if place(plan) == place(chosen))
