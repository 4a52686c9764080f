"""A small part of `benchmarks/gate_simulation.py`: the real gate over simulated nights, seeded."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gate_simulation import Machine, Noise, finds, list_keys, simulate_clean, simulate_planted
from sdopt.perf.history.nights import take_values


def test_clean_nights_wake_nobody() -> None:
    result = simulate_clean("clean", Noise(), 3, 101, can_confirm=True, early=False)
    assert (result.nights, result.alarms) == (60, 0)
    assert result.series_asked_a_night > 0  # the A/B had something to clear


@pytest.mark.parametrize(("can_confirm", "within"), [(True, 1), (False, 2)])
def test_five_per_cent_are_found(can_confirm: bool, within: int) -> None:
    result = simulate_planted("5 %", Noise(), 10, 102, 0.05, within, can_confirm=can_confirm, budget=None)
    assert result.found_by_night[-1] >= 9


def test_without_noise_every_slow_down_beyond_two_per_cent_is_found_and_none_below() -> None:
    for change, is_found in ((0.025, True), (0.015, False)):
        machine = Machine(np.random.default_rng(1), Noise(0.001, 0.001, 0.001, 0.001), list_keys(10))
        for _ in range(14):
            machine.add(machine.run_night())
        report = machine.judge(machine.run_night({3: 1 + change}))
        assert bool(finds(report, machine.keys[3])) == is_found
        assert {finding.series for finding in report.findings} <= {machine.keys[3]}


def test_a_slow_commit_stays_found_the_second_night_although_the_first_missed_it() -> None:
    """It passed the first night, and must not be what the second night's A/B is held against."""
    machine = Machine(np.random.default_rng(2), Noise(0.001, 0.001, 0.001, 0.001), list_keys(10))
    for _ in range(14):
        machine.add(machine.run_night())
    machine.add(machine.run_night({3: 1.03}))  # passed, as after a screen that missed it
    assert finds(machine.judge(machine.run_night({3: 1.03})), machine.keys[3])


def test_simulated_nights_scatter_as_they_should() -> None:
    """Of a night's median: the noise of nights, that of two processes, and that of twenty samples."""
    noise = Noise()
    keys = list_keys(10)
    machine = Machine(np.random.default_rng(3), noise, keys)
    logs = np.log([[*take_values(machine.run_night()).values()] for _ in range(400)])
    expected = noise.night**2 + noise.night_of_series**2 + noise.process**2 / 2 + noise.sample**2 / 20 * np.pi / 2
    assert float(logs.std(axis=0).mean()) == pytest.approx(float(np.sqrt(expected)), rel=0.1)
    common = float(np.corrcoef(logs[:, 0], logs[:, 1])[0, 1])
    assert common == pytest.approx(noise.night**2 / expected, abs=0.12)
