"""Which of a bundle's plans this machine runs, or why none: from the manifest, NVML and package metadata alone.

What runs where is NVIDIA's word, for TensorRT-RTX in its guide's "CPU-Only AOT" and "Engine Compatibility" pages: a
plan for named compute capabilities runs on those, the default one on 8.0, 8.6, 8.9, 12.0 and later, but never on those
between them as 9.0 (measured), and no plan with
another release than its own. General TensorRT's plans run with its own release, on the generation they were built on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sdopt.bundle.again import again_command, beside
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.plan_header import RTX_GENERATIONS, find_rtx_target, runs_portable
from sdopt.bundle.records import ComponentRecord, PlanRecord
from sdopt.errors import EnvironmentMissingError, MissingDependency, MissingHardware
from sdopt.machine.environment import Machine
from sdopt.machine.gpus import Gpu
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision
from sdopt.model.quantization import Scheme
from sdopt.model.target import PORTABLE, Runtime, Target

# Least driver of Linux by the major version of CUDA that a library was built with, from NVIDIA's "CUDA Compatibility".
_LEAST_DRIVER = {12: 525, 13: 580}
_LEAST_FP8 = 89
_EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "gpu"}
# For the CUDA context, activations and workspace beside the plans. Not measured: no GPU has run one yet.
_MARGIN_BYTES = 1 << 30

PlanChoice = dict[ComponentName, tuple[PlanRecord, ...]]
"""The plans of each component that has any, one for each profile."""


@dataclass(frozen=True)
class Obstacle:
    """One reason why none of some plans runs here, and the command that mends it."""

    sentence: str
    hint: str
    kind: type[EnvironmentMissingError] = MissingHardware


def choose_plans(folder: Path, manifest: BundleManifest, machine: Machine) -> PlanChoice:
    """The best plan of each component and profile. Raises `MissingHardware` or `MissingDependency` with every reason
    why there is none; its hint mends the first. `folder` is what the hints call the bundle.
    """
    chosen: PlanChoice = {}
    found: dict[Obstacle, list[ComponentName]] = {}
    for name, record in manifest.components.items():
        if record.plans:
            chosen[name], obstacles = _choose(record, _Judge(folder, manifest, machine))
            for obstacle in obstacles:
                found.setdefault(obstacle, []).append(name)
    if chosen and not found:
        found = {lack: list(chosen) for lack in _find_lack_of_memory(folder, manifest, chosen, machine.gpus[0])}
    if found:
        first = next(iter(found))
        sentences = (
            obstacle.sentence if len(names) == len(chosen) else f"{', '.join(names)}: {obstacle.sentence}"
            for obstacle, names in found.items()
        )
        raise first.kind("; ".join(sentences), hint=first.hint)
    return chosen


def _choose(record: ComponentRecord, judge: _Judge) -> tuple[tuple[PlanRecord, ...], list[Obstacle]]:
    """Profiles that share a plan have a record each, so a component has records of every profile or of none."""
    chosen: list[PlanRecord] = []
    obstacles: dict[Obstacle, None] = {}
    for profile in sorted({plan.profile for plan in record.plans}):
        fit, against = judge.sift([plan for plan in record.plans if plan.profile == profile])
        obstacles |= dict.fromkeys(against)
        if not against:
            chosen.append(min(fit, key=lambda plan: (plan.generation == PORTABLE, plan.flavour == "tensorrt")))
    return tuple(chosen), list(obstacles)


@dataclass(frozen=True)
class _Judge:
    """The questions to a plan, each with the obstacle where no plan passes; the most final first."""

    folder: Path
    manifest: BundleManifest
    machine: Machine

    def sift(self, plans: list[PlanRecord]) -> tuple[list[PlanRecord], list[Obstacle]]:
        """The plans that pass every question, and an obstacle for each question that none passes."""
        questions: tuple[tuple[Callable[[PlanRecord], bool], Callable[[list[PlanRecord]], Obstacle]], ...] = (
            (lambda plan: bool(self.machine.gpus), self._no_gpu),
            (lambda plan: plan.system == self.machine.system, self._other_system),
            (self._is_of_generation, self._other_generation),
            (lambda plan: plan.flavour in self.machine.libraries, self._no_library),
            (self._is_of_version, self._other_version),
            (self._has_driver, self._old_driver),
        )
        obstacles: list[Obstacle] = []
        for passes, explain in questions:
            if left := [plan for plan in plans if passes(plan)]:
                plans = left
            else:
                obstacles.append(explain(plans))
        return plans, obstacles

    def _no_gpu(self, plans: list[PlanRecord]) -> Obstacle:
        sentence = "the plans need an NVIDIA GPU, and this machine shows none"
        return Obstacle(sentence, _rebuild_for_cpu(self.folder))

    def _other_system(self, plans: list[PlanRecord]) -> Obstacle:
        # NVIDIA calls TensorRT-RTX's plans portable between Windows and Linux. No plan has been carried over here.
        systems = _list_words(plan.system for plan in plans)
        hint = again_command(self.folder)
        return Obstacle(f"the plans were built for {systems}, and this is {self.machine.system}", hint)

    def _is_of_generation(self, plan: PlanRecord) -> bool:
        if not self.machine.gpus:
            return True
        here = self.machine.gpus[0].generation
        return plan.generation == here or (plan.generation == PORTABLE and runs_portable(here))

    def _other_generation(self, plans: list[PlanRecord]) -> Obstacle:
        gpu = self.machine.gpus[0]
        has = _list_words(plan.generation for plan in plans)
        sentence = f"there are plans for {has}, and the {gpu.name} here is {gpu.generation}"
        return Obstacle(sentence, self._rebuild_for(gpu.generation, {plan.generation for plan in plans}))

    def _rebuild_for(self, here: str, offered: set[str]) -> str:
        """Keeps the plans of other generations; where TensorRT-RTX runs none, another runtime takes the same recipe."""
        manifest = self.manifest
        if manifest.recipe.target.runtime is not Runtime.RTX:
            target = Target(Runtime.TENSORRT)
        elif (rtx := find_rtx_target(here)) is None:
            target = self._other_runtime()
        else:
            kept = offered & RTX_GENERATIONS.keys()
            target = Target(Runtime.RTX, tuple(sorted(kept | {here}, key=_number))) if rtx.generations else rtx
        lost = _has_fp8(manifest) and _number(here) < _LEAST_FP8
        return again_command(self.folder, target=target, precision=Precision.AUTO if lost else None)

    def _other_runtime(self) -> Target:
        """ONNX Runtime, which needs no more than the card; TensorRT for types that ONNX Runtime does not compute in."""
        recipe = self.manifest.recipe
        asked = {recipe.precision, *recipe.component_precision.values()}
        simple = not recipe.quantization_file and Precision.BF16 not in asked
        return Target(Runtime.CUDA if simple and "tensorrt" not in self.machine.libraries else Runtime.TENSORRT)

    def _no_library(self, plans: list[PlanRecord]) -> Obstacle:
        plan = plans[0]
        pin = f"pip install 'sdopt[{_EXTRAS[plan.flavour]}]' '{plan.flavour}=={plan.version}'"
        return Obstacle(f"{plan.flavour} is not installed", pin, MissingDependency)

    def _is_of_version(self, plan: PlanRecord) -> bool:
        library = self.machine.libraries.get(plan.flavour)
        return library is None or _release(library.version) == _release(plan.version)

    def _other_version(self, plans: list[PlanRecord]) -> Obstacle:
        plan = plans[0]
        versions = _list_words(each.version for each in plans)
        installed = self.machine.libraries[plan.flavour].version
        return Obstacle(
            f"the plans are of {plan.flavour} {versions}, and {installed} is installed, which opens only its own",
            f"pip install '{plan.flavour}=={plan.version}'",
            MissingDependency,
        )

    def _has_driver(self, plan: PlanRecord) -> bool:
        return not self.machine.gpus or _number(self.machine.gpus[0].record.driver) >= self._least_driver(plan)

    def _least_driver(self, plan: PlanRecord) -> int:
        library = self.machine.libraries.get(plan.flavour)
        if library is None or library.cuda_major is None or not self.machine.system.startswith("Linux"):
            return 0
        return _LEAST_DRIVER.get(library.cuda_major, 0)

    def _old_driver(self, plans: list[PlanRecord]) -> Obstacle:
        plan, driver = plans[0], self.machine.gpus[0].record.driver
        least = self._least_driver(plan)
        return Obstacle(
            f"NVIDIA's driver is {driver}, and the installed {plan.flavour} needs {least} or newer",
            f"install driver {least} or newer: https://www.nvidia.com/drivers",
        )


def estimate_device_bytes(chosen: PlanChoice) -> int:
    """What the GPU must hold, about: every component's largest plan, and a margin. Streamed weights count nothing."""
    sizes = (
        max((plan.audit.plan_bytes for plan in plans if not plan.weight_streaming), default=0)
        for plans in chosen.values()
    )
    return sum(sizes) + _MARGIN_BYTES


def _find_lack_of_memory(folder: Path, manifest: BundleManifest, chosen: PlanChoice, gpu: Gpu) -> list[Obstacle]:
    needed_bytes, total_bytes = estimate_device_bytes(chosen), gpu.record.memory_bytes
    needs = f"the plans need about {needed_bytes / 1e9:.1f} GB of the GPU's memory, by an estimate, and the {gpu.name}"
    if total_bytes and needed_bytes > total_bytes:
        return [Obstacle(f"{needs} has {total_bytes / 1e9:.1f} GB", _rebuild_for_cpu(folder))]
    if total_bytes and needed_bytes > gpu.free_bytes:
        sentence = f"{needs} has {gpu.free_bytes / 1e9:.1f} GB free"
        return [Obstacle(sentence, "end what else uses the GPU; nvidia-smi lists it")]
    return []


def _has_fp8(manifest: BundleManifest) -> bool:
    records = [record.quantization for record in manifest.components.values()]
    return manifest.recipe.precision is Precision.FP8 or any(
        record is not None and record.settings.scheme is Scheme.FP8 for record in records
    )


def _rebuild_for_cpu(folder: Path) -> str:
    """Beside the bundle, which is whole and may be on its way to another machine. Its precision may be a GPU's."""
    output = beside(folder, "cpu")
    return again_command(folder, output=output, target=Target(Runtime.CPU), precision=Precision.AUTO)


def _list_words(words: Iterable[str]) -> str:
    """`a`, `a and b` or `a, b and c`, each once."""
    *rest, last = dict.fromkeys(words)
    return f"{', '.join(rest)} and {last}" if rest else last


def _number(text: str) -> int:
    """The first number in `sm89` or `580.65.06`."""
    match = re.search(r"\d+", text)
    return int(match[0]) if match else 0


def _release(version: str) -> tuple[str, ...]:
    """The numbers of a version without what packages append, as in `10.13.3.9.post1`."""
    return tuple(re.findall(r"\d+", version))[:4]
