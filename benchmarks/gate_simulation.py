"""How often the gate of `sdopt perf` wakes somebody for nothing, and how soon it finds what it should.

    python benchmarks/gate_simulation.py --json benchmarks/reports/gate-simulation.json \
        --markdown benchmarks/reports/gate-simulation.md

Simulated nights go through the real gate (`sdopt.perf.gate.gate`), run by run, with the verdicts of the nights before.
A night's time is its series' true time, times the noise of the night (of the whole machine, and of the series),
of the process, and of the sample; all are log-normal. An A/B of the same night shares the night's noise and has its own
processes and samples. Every seed is fixed: the same table comes out again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, chi2

from sdopt.bench.case.report import Conditions
from sdopt.machine.machine_record import EnvironmentRecord
from sdopt.perf.gate.confirm_rules import Confirm, Confirmation
from sdopt.perf.gate.findings import GateReport, Rule
from sdopt.perf.gate.gate import judge_night
from sdopt.perf.history.nights import find_last_good
from sdopt.perf.history.record import Metric, RunKind, RunRecord, SeriesKey, SeriesRecord

SERIES = 40
HISTORY_NIGHTS = 14
CLEAN_NIGHTS = 20
MONTH_NIGHTS = 30
_PROCESSES = 2
# An A/B of six pairs: the real one takes as many as there is time for, at most `confirm.MOST_PAIRS`.
_PAIRS = 6
_SAMPLES = 10
_START = datetime(2026, 1, 1, 3, tzinfo=UTC)
_KEPT = {True: "yes", False: "no", None: ""}
_REPORT = Path(__file__).parent / "tiny-shapes" / "report.json"
_METRICS = (Metric.END_TO_END, Metric.UNET_STEP, Metric.TEXT_ENCODER, Metric.VAE_DECODER, Metric.OVERHEAD)


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the logarithms: 0.01 is 1 %."""

    night: float = 0.009
    night_of_series: float = 0.0045
    process: float = 0.007
    sample: float = 0.015

    def times(self, factor: float) -> Noise:
        return Noise(*(factor * value for value in asdict(self).values()))


def list_keys(count: int = SERIES) -> list[SeriesKey]:
    """Cases of one candidate with five stages each."""
    return [SeriesKey(case=f"case{i // 5}", candidate="engines", metric=_METRICS[i % 5]) for i in range(count)]


@dataclass
class Machine:
    """A machine and the commits that it measures, one a night. `factors` are their true times, by night and series."""

    rng: np.random.Generator
    noise: Noise
    keys: Sequence[SeriesKey]
    can_confirm: bool = True
    first_day: int = 0
    records: list[RunRecord] = field(default_factory=list)
    factors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    asked: int = 0
    """How many series were measured again, over all nights."""

    def __post_init__(self) -> None:
        self._base_ns = np.exp(self.rng.uniform(np.log(1e6), np.log(1e9), len(self.keys)))

    def run_night(self, factors: Mapping[int, float] | None = None) -> RunRecord:
        """Measure a new commit, whose series of these numbers take that many times as long as on the first night."""
        number = len(self.records)
        true = np.ones(len(self.keys))
        for index, factor in (factors or {}).items():
            true[index] = factor
        commit = f"{number + 1:040x}"
        self.factors[commit] = true
        noise = self.noise
        night = self.rng.normal(0, noise.night) + self.rng.normal(0, noise.night_of_series, len(self.keys))
        groups = self._draw(self._base_ns * true * np.exp(night), _PROCESSES)
        return make_record(number + self.first_day, commit, self.keys, groups)

    def judge(self, record: RunRecord) -> GateReport:
        """By the real gate; the record joins the history with its verdict."""
        report = judge_night(self.records, record, self._confirm(record) if self.can_confirm else None)
        self.records.append(record.model_copy(update={"verdict": report.recorded_verdict}))
        return report

    def add(self, record: RunRecord) -> None:
        """To the history, as passed."""
        self.records.append(record.model_copy(update={"verdict": "pass"}))

    def _confirm(self, record: RunRecord) -> Confirm:
        def measure(suspects: Sequence[SeriesKey]) -> dict[SeriesKey, Confirmation] | None:
            good = find_last_good(self.records, record)
            if good is None:
                return None
            self.asked += len(suspects)
            indices = [self.keys.index(key) for key in suspects]
            sides = [
                self._draw(self._base_ns[indices] * self.factors[commit][indices], _PAIRS)
                for commit in (good.commit, record.commit)
            ]
            return {key: Confirmation(a.tolist(), b.tolist()) for key, a, b in zip(suspects, *sides, strict=True)}

        return measure

    def _draw(self, medians_ns: NDArray[np.float64], processes: int) -> NDArray[np.float64]:
        """(series) -> (series, processes, samples)."""
        shape = (medians_ns.size, processes, _SAMPLES)
        process = self.rng.normal(0, self.noise.process, (*shape[:2], 1))
        return medians_ns[:, None, None] * np.exp(process + self.rng.normal(0, self.noise.sample, shape))


def make_record(
    night: int, commit: str, keys: Sequence[SeriesKey], groups: NDArray[np.float64], dirty: tuple[str, ...] = ()
) -> RunRecord:
    created = _START + timedelta(days=night)
    # Not validated: a simulation makes hundreds of thousands of series.
    series = tuple(
        SeriesRecord.model_construct(key=key, groups=tuple(map(tuple, rows)))
        for key, rows in zip(keys, groups.tolist(), strict=True)
    )
    environment = EnvironmentRecord(
        sdopt="0", python="3.11", system="Linux", processor="simulated", cpu_features=(), libraries={}
    )
    return RunRecord.model_construct(
        id=f"{created:%Y%m%dT%H%M%SZ}-{night:08x}", created_utc=created.isoformat(), kind=RunKind.NIGHTLY,
        suite="simulated", suite_digest="0" * 64, commit=commit, changed=False, fingerprint="simulated",
        environment=environment, logical_cores=1, memory_bytes=1, digests={}, dirty=dirty, conditions=Conditions(),
        series=series, failures=(), wall_ns=0, verdict="",
    )  # fmt: skip


@dataclass(frozen=True)
class CleanResult:
    """False alarms: nights that alarmed though no commit changed anything."""

    name: str
    runs: int
    nights: int
    alarms: int
    rules: dict[str, int]
    alarms_a_month: float
    alarms_a_month_at_most: float
    """Upper end of the 95 % interval of a Poisson rate, one-sided."""
    series_asked_a_night: float
    budget: float | None

    @property
    def kept(self) -> bool | None:
        return None if self.budget is None else self.alarms_a_month_at_most < self.budget


@dataclass(frozen=True)
class PlantedResult:
    """A slow-down of one series from one night on. `found_by_night` counts runs: found on the first, by the second."""

    name: str
    change: float
    runs: int
    found_by_night: tuple[int, ...]
    within: int
    share: float
    share_at_least: float
    """Lower end of the one-sided 95 % interval of Clopper and Pearson."""
    budget: float | None

    @property
    def kept(self) -> bool | None:
        return None if self.budget is None else self.share >= self.budget


@dataclass(frozen=True)
class DriftResult:
    """One series becomes slower by the same part every night."""

    name: str
    change_a_night: float
    runs: int
    not_found: int
    median_nights: float | None
    p90_nights: float | None
    rules: dict[str, int]


def simulate_clean(
    name: str, noise: Noise, runs: int, seed: int, *, can_confirm: bool, early: bool, budget: float | None = 1.0
) -> CleanResult:
    """`early` counts the nights before there are 14 of history, from the first; else the 20 nights after them."""
    alarms, asked = 0, 0
    rules: dict[str, int] = {}
    nights = HISTORY_NIGHTS if early else CLEAN_NIGHTS
    for machine in _make_machines(noise, runs, seed, can_confirm):
        for _ in range(0 if early else HISTORY_NIGHTS):
            machine.add(machine.run_night())
        for _ in range(nights):
            report = machine.judge(machine.run_night())
            alarms += report.verdict == "alarm"
            for rule in {finding.rule for finding in report.findings}:
                rules[rule] = rules.get(rule, 0) + 1
        asked += machine.asked
    months = runs * nights / MONTH_NIGHTS
    most = float(chi2.ppf(0.95, 2 * (alarms + 1))) / 2
    return CleanResult(
        name, runs, runs * nights, alarms, rules, alarms / months, most / months, asked / (runs * nights), budget
    )


def simulate_planted(
    name: str,
    noise: Noise,
    runs: int,
    seed: int,
    change: float,
    within: int,
    *,
    can_confirm: bool,
    budget: float | None,
) -> PlantedResult:
    found = [0] * within
    for machine in _make_machines(noise, runs, seed, can_confirm):
        target = int(machine.rng.integers(len(machine.keys)))
        for _ in range(HISTORY_NIGHTS):
            machine.add(machine.run_night())
        for night in range(within):
            if finds(machine.judge(machine.run_night({target: 1 + change})), machine.keys[target]):
                for later in range(night, within):
                    found[later] += 1
                break
    count = found[-1]
    least = float(beta.ppf(0.05, count, runs - count + 1)) if count else 0.0
    return PlantedResult(name, change, runs, tuple(found), within, count / runs, least, budget)


def simulate_drift(
    name: str, noise: Noise, runs: int, seed: int, change: float, *, can_confirm: bool, most_nights: int = 56
) -> DriftResult:
    nights: list[int] = []
    rules: dict[str, int] = {}
    for machine in _make_machines(noise, runs, seed, can_confirm):
        target = int(machine.rng.integers(len(machine.keys)))
        for _ in range(HISTORY_NIGHTS):
            machine.add(machine.run_night())
        for night in range(1, most_nights + 1):
            report = machine.judge(machine.run_night({target: (1 + change) ** night}))
            rule = finds(report, machine.keys[target])
            if rule:
                nights.append(night)
                rules[rule] = rules.get(rule, 0) + 1
                break
    middle, late = (
        float(np.quantile([*nights, *[np.inf] * (runs - len(nights))], q, method="higher")) for q in (0.5, 0.9)
    )
    return DriftResult(name, change, runs, runs - len(nights), _or_none(middle), _or_none(late), rules)


def finds(report: GateReport, key: SeriesKey) -> Rule | None:
    """By which rule the gate says that this series is slower."""
    slow = (f.rule for f in report.findings if f.series == key and f.rule in (Rule.SLOWER, Rule.DRIFT))
    return next(slow, None)


def _make_machines(noise: Noise, runs: int, seed: int, can_confirm: bool) -> Iterator[Machine]:
    for run in range(runs):
        rng = np.random.default_rng((seed, run))
        yield Machine(rng, noise, list_keys(), can_confirm, first_day=int(rng.integers(7)))


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def measure_noise(path: Path) -> Noise:
    """Process and sample noise of a report of the bench: medians over its candidates and stages; nights it has none.

    Of samples their MAD within a process, of processes the distance of the medians of two; scaled to normal ones.
    """
    samples, processes = [], []
    for candidate in json.loads(path.read_bytes())["candidates"]:
        stages = [process["samples_ns"] for process in candidate["processes"]]
        for stage in set.intersection(*map(set, stages)) if stages else ():
            logs = [np.log(np.array(each[stage], dtype=np.float64)) for each in stages]
            samples += [1.4826 * float(np.median(np.abs(log - np.median(log)))) for log in logs]
            medians = [float(np.median(log)) for log in logs]
            processes += [abs(a - b) / (2**0.5 * 0.6745) for a, b in itertools.pairwise(medians)]
    return Noise(0.0, 0.0, float(np.median(processes)), float(np.median(samples)))


def simulate_all(clean_runs: int, planted_runs: int) -> dict[str, list[Any]]:
    usual, loud = Noise(), Noise().times(2)
    clean: list[CleanResult] = []
    planted: list[PlantedResult] = []
    for name, noise, seed, can_confirm, early in (
        ("20 nights after 14, with A/B", usual, 1, True, False),
        ("20 nights after 14, no machine time", usual, 2, False, False),
        ("the first 14 nights, with A/B", usual, 3, True, True),
        ("the first 14 nights, no machine time", usual, 4, False, True),
        ("twice the noise, with A/B", loud, 5, True, False),
        ("twice the noise, no machine time", loud, 6, False, False),
    ):
        runs, budget = (clean_runs, 1.0) if noise is usual else (clean_runs // 2, None)
        result = simulate_clean(name, noise, runs, seed, can_confirm=can_confirm, early=early, budget=budget)
        clean.append(_say(result))
    for name, noise, seed, change, within, can_confirm, budget in (
        ("5 %, with A/B", usual, 11, 0.05, 1, True, 0.95),
        ("3 %, with A/B", usual, 12, 0.03, 2, True, 0.95),
        ("5 %, no machine time", usual, 13, 0.05, 2, False, None),
        ("3 %, no machine time", usual, 14, 0.03, 2, False, None),
        ("5 %, twice the noise, with A/B", loud, 15, 0.05, 2, True, None),
        ("10 %, twice the noise, with A/B", loud, 16, 0.10, 1, True, None),
    ):
        result = simulate_planted(
            name, noise, planted_runs, seed, change, within, can_confirm=can_confirm, budget=budget
        )
        planted.append(_say(result))
    drift = [
        _say(simulate_drift("with A/B", usual, planted_runs // 4, 21, 0.003, can_confirm=True)),
        _say(simulate_drift("no machine time", usual, planted_runs // 4, 22, 0.003, can_confirm=False)),
    ]
    return {"clean": clean, "planted": planted, "drift": drift}


def render_tables(results: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> str:
    lines = [
        "# Simulation of the gate", "",
        f"By `{settings['command']}`, with fixed seeds.", "",
        f"{SERIES} series; each night {_PROCESSES} processes of {_SAMPLES} samples, an A/B {_PAIRS} a side.",
        _describe_noise("The noise", settings["noise"]),
        _describe_noise("For comparison, `benchmarks/tiny-shapes/report.json` has", settings["measured_noise"]), "",
        "## Clean nights", "",
        f"A month has {MONTH_NIGHTS} nights; the bound is the upper end of a one-sided 95 % interval. The budget is",
        "less than one false alarm a month, for the bound as well. Rows of twice the noise have no budget.", "",
        "| Nights | Judged | Alarms | A month | At most | Series asked for an A/B, a night | Kept |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    lines += [
        f"| {r.name} | {r.nights} | {r.alarms} | {r.alarms_a_month:.2f} | {r.alarms_a_month_at_most:.2f} | "
        f"{r.series_asked_a_night:.1f} | {_KEPT[r.kept]} |"
        for r in results["clean"]
    ]
    lines += [
        "", "## One series becomes slower from one night on", "",
        f"After {HISTORY_NIGHTS} clean nights. Without an A/B two nights are needed: the first never alarms.", "",
        "| Slow-down | Runs | Found on the first night | By the second | Share | At least | Budget | Kept |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    lines += [
        f"| {r.name} | {r.runs} | {r.found_by_night[0]} | {r.found_by_night[1] if r.within > 1 else ''} | "
        f"{r.share:.1%} | {r.share_at_least:.1%} | {_name_budget(r)} | {_KEPT[r.kept]} |"
        for r in results["planted"]
    ]
    lines += [
        "", "## One series becomes 0.3 % slower every night", "",
        "| | Runs | Median night | 90 % by night | Not found in 56 | Found by |", "|---|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    lines += [
        f"| {r.name} | {r.runs} | {_name_night(r.median_nights)} | {_name_night(r.p90_nights)} | {r.not_found} | "
        f"{', '.join(f'{rule} {count}' for rule, count in sorted(r.rules.items()))} |"
        for r in results["drift"]
    ]
    return "\n".join(lines) + "\n"


def _describe_noise(what: str, noise: Mapping[str, float]) -> str:
    parts = [f"{name.replace('_', ' ')} {value:.2%}" for name, value in noise.items() if value]
    return f"{what}: {', '.join(parts)}."


def _name_budget(result: PlantedResult) -> str:
    return "" if result.budget is None else f"{result.budget:.0%} within {result.within}"


def _name_night(night: float | None) -> str:
    return "" if night is None else f"{night:.0f}"


def _say(result: Any) -> Any:
    click.echo(result, err=True)
    return result


@click.command()
@click.option("--clean-runs", default=50, show_default=True, help="runs of 20 clean nights, for each row")
@click.option("--planted-runs", default=200, show_default=True, help="runs with a slow-down, for each row")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="write the figures here")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="write the tables here")
def main(clean_runs: int, planted_runs: int, json_path: Path | None, markdown: Path | None) -> None:
    """Print the tables; exit code 1 where a budget is not kept."""
    started = time.monotonic()
    results = simulate_all(clean_runs, planted_runs)
    settings = {
        "command": f"python benchmarks/gate_simulation.py --clean-runs {clean_runs} --planted-runs {planted_runs}",
        "noise": asdict(Noise()),
        "measured_noise": asdict(measure_noise(_REPORT)),
    }
    table = render_tables(results, settings)
    click.echo(table)
    click.echo(f"{time.monotonic() - started:.0f} s", err=True)
    if markdown:
        markdown.write_text(table)
    if json_path:
        rows = {name: [asdict(row) | _list_kept(row) for row in rows] for name, rows in results.items()}
        json_path.write_text(json.dumps({"settings": settings, **rows}, indent=2) + "\n")
    if any(_list_kept(row).get("kept") is False for rows in results.values() for row in rows):
        raise SystemExit(1)


def _list_kept(row: Any) -> dict[str, bool | None]:
    return {"kept": row.kept} if hasattr(row, "kept") else {}


if __name__ == "__main__":
    main()
