"""What the stages of one conversion share: what was decided, where the bundle grows, and what is made so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import GraphAudit, ParityRecord, SlotsRecord
from sdopt.convert.plan import BuildPlan
from sdopt.disk.digest import FileRecord
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store
from sdopt.model.component import ComponentName

if TYPE_CHECKING:
    from sdopt.convert.fidelity import PictureJudge
    from sdopt.convert.plans.ladder import MadePlan


@dataclass(frozen=True)
class Step:
    """One part of a stage, as `--dry-run` shows it. `found` means that nothing is to be done.

    Disk is what stays, memory the peak of the process that does it; memory and seconds are estimates.
    """

    stage: str
    component: str
    key: str
    found: bool
    disk_bytes: int
    memory_bytes: int
    expected_s: float
    note: str = ""
    """The component's precision and why, where sdopt chose it."""


@dataclass
class Build:
    """One conversion. `cache` is the folder that the store and its children work in.

    A dry run has no staging folder: it asks for estimates alone, and they write nothing.
    """

    plan: BuildPlan
    output: Path
    store: Store
    cache: Path
    graphs: dict[ComponentName, tuple[Path, GraphAudit]] = field(default_factory=dict)
    weights: Mapping[ComponentName, FileRecord] = field(default_factory=dict)
    parity: Mapping[ComponentName, ParityRecord] = field(default_factory=dict)
    slots: Mapping[ComponentName, SlotsRecord] = field(default_factory=dict)
    plans: list[MadePlan] = field(default_factory=list)
    draft: BundleManifest | None = None
    """The manifest as it grows: of the staged 16-bit bundle first, then quantised, with plans, judged."""
    started_ns: int = field(default_factory=time.monotonic_ns)

    @cached_property
    def staging(self) -> Staging:
        """Made when a stage first writes."""
        return Staging(self.output)

    @cached_property
    def pictures(self) -> PictureJudge:
        """torch's pictures are drawn once for all drafts of a build."""
        from sdopt.convert.fidelity import PictureJudge

        return PictureJudge(self.store, self.staging)

    @property
    def manifest(self) -> BundleManifest:
        assert self.draft is not None, "the stage before this one writes the draft"
        return self.draft

    @property
    def draws_pictures(self) -> bool:
        return self.plan.recipe.verify.enabled and self.plan.recipe.verify.fidelity


@dataclass(frozen=True)
class Stage:
    """One stage of `sdopt convert`: `estimate` says what `run` would do, for `--dry-run` and for the time that is left.

    `estimate` reads the store and writes nothing; it yields nothing where the build has no such stage.
    """

    name: str
    estimate: Callable[[Build], Iterator[Step]]
    run: Callable[[Build], None]
