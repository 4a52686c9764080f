"""One component on its way: its groups of layers, the trials of them, and which are kept."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from sdopt.bundle.records import BlockRecord, QuantizationRecord
from sdopt.convert.blocks.choose import GroupVerdict, Measurement, Outcome, choose_groups, find_loss
from sdopt.convert.blocks.trials import Trial, TrialJob, TrialRecord, run_trials
from sdopt.convert.blocks.write import publish_choice
from sdopt.disk.digest import FileRecord, digest_of
from sdopt.graph.qdq import LayerChoice
from sdopt.model.component import ComponentName
from sdopt.model.quantization import ComponentQuantization, QuantizationSettings, Scheme


class Candidate:
    """`groups` are the layers that are judged together, by the group's name.

    `job` describes the component to the trials, and `identity` is a digest of all that their results depend on.
    """

    def __init__(
        self, settings: ComponentQuantization, groups: Mapping[str, Mapping[str, LayerChoice]], job: TrialJob,
        identity: str,
    ) -> None:  # fmt: skip
        self.settings, self.groups = settings, groups
        self._job, self._identity = job, identity
        self._verdicts: dict[str, GroupVerdict] = {}
        self._slack_ns = 0.0

    @property
    def name(self) -> ComponentName:
        return self._job.spec.name

    @property
    def kept(self) -> tuple[str, ...]:
        """The groups that are quantised, as things stand, in the order of the graph."""
        return tuple(group for group in self.groups if not self._verdicts[group].reason)

    @property
    def layers(self) -> dict[str, LayerChoice]:
        """The layers that are quantised, as things stand."""
        return self._layers_of(self.kept)

    @property
    def verdicts(self) -> Mapping[str, GroupVerdict]:
        return self._verdicts

    def try_groups(self, error_limit: float, picture_share_ns: float) -> None:
        """Try each group alone, and what pays together. `picture_share_ns` is what a picture may take longer."""
        self._slack_ns = picture_share_ns
        self._run([(group,) for group in self.groups])
        schemes = {group: self.settings.scheme for group in self.groups}
        outcome: Outcome = choose_groups(schemes, self._measure, error_limit=error_limit, slack_ns=picture_share_ns)
        self._verdicts = outcome.groups

    def keep_only(self, groups: Collection[str], reason: str) -> None:
        """Quantise just these of the groups that were kept; the others stay in 16 bits for `reason`."""
        for group in self.kept:
            if group not in groups:
                self._verdicts[group] = GroupVerdict(self._verdicts[group].measured, reason)

    def confirm(self) -> None:
        """Keep nothing where what is kept does not gain any more, after some groups were taken back."""
        if self.kept and (loss := find_loss(self.settings.scheme, self._measure(self.kept), self._slack_ns)):
            self.keep_only((), loss)

    def set_aside(self, folder: Path) -> None:
        """Move the 16-bit component out of the way of what is published."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._job.stock.folder.rename(folder)
        self._job = dataclasses.replace(self._job, stock=dataclasses.replace(self._job.stock, folder=folder))

    def publish(self, target: Path, groups: Collection[str]) -> FileRecord:
        """Write the component with these groups quantised to `target`; returns the record of its weight file."""
        shutil.rmtree(target, ignore_errors=True)
        layers = self._layers_of(tuple(group for group in self.groups if group in groups))
        record = publish_choice(self._job.stock, target, layers, f"writing the weights of {self.name}")
        shutil.copyfile(self._job.stock.folder / "config.json", target / "config.json")
        return record

    def base_run_ns(self) -> float:
        """Median time of the 16-bit engine; 0 where it does not run here."""
        runs = [record.base_run_ns for record in self._run([(group,) for group in self.groups]).values()]
        return min(runs)

    def describe(
        self, settings: QuantizationSettings, trajectories: str, weights_bytes: int, weights_bytes_16bit: int
    ) -> QuantizationRecord:
        together = self._run([self.kept])[self.kept] if self.kept else None
        alone = self._run([(group,) for group in self.groups])
        return QuantizationRecord(
            settings=self.settings, calibration=settings.calibration, trajectories=trajectories,
            runtime=self._job.runtime.kind, blocks=tuple(self._describe_block(group) for group in self.groups),
            error_limit=settings.held_out_error,
            base_error=next(iter(alone.values())).base_error, error=together and together.error,
            speedup=together and together.speedup, integer_layers=together and together.integer_layers,
            weights_bytes=weights_bytes, weights_bytes_16bit=weights_bytes_16bit,
        )  # fmt: skip

    def _describe_block(self, group: str) -> BlockRecord:
        verdict = self._verdicts[group]
        return BlockRecord(
            name=group, layers=len(self.groups[group]), scheme=self.settings.scheme, quantized=not verdict.reason,
            reason=verdict.reason, error=verdict.measured.error, speedup=verdict.measured.speedup,
        )  # fmt: skip

    def _layers_of(self, groups: tuple[str, ...]) -> dict[str, LayerChoice]:
        return {layer: choice for group in groups for layer, choice in self.groups[group].items()}

    def _run(self, sets: list[tuple[str, ...]]) -> dict[tuple[str, ...], TrialRecord]:
        trials = {groups: self._make_trial(groups) for groups in sets}
        records = run_trials(dataclasses.replace(self._job, trials=list(trials.values())))
        return {groups: records[trial.key] for groups, trial in trials.items()}

    def _make_trial(self, groups: tuple[str, ...]) -> Trial:
        layers = self._layers_of(groups)
        choices = {layer: [choice.scheme, choice.smooth] for layer, choice in layers.items()}
        label = groups[0] if len(groups) == 1 else f"{len(groups)} blocks together"
        return Trial(digest_of([self._identity, choices]), label, layers)

    def _measure(self, groups: tuple[str, ...]) -> Measurement:
        record, layers = self._run([groups])[groups], self._layers_of(groups)
        wanted = sum(choice.scheme is Scheme.INT8 for choice in layers.values())
        found = wanted if record.integer_layers is None else record.integer_layers
        return Measurement(
            error=record.error,
            base_error=record.base_error,
            speedup=record.speedup,
            slower_ns=record.slower_ns,
            float_layers=max(0, wanted - found),
        )
