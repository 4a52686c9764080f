"""What separates two series, what does not, and what links them."""

from __future__ import annotations

from typing import Any

import pytest

from sdopt.machine.machine_record import GpuRecord
from sdopt.perf.history.fingerprint import describe_change, fingerprint_of
from sdopt.perf.history.history import HistoryContents
from sdopt.perf.history.nights import find_last_good
from sdopt.perf.history.record import Metric, RunKind
from sdopt.perf.history.view import describe_breaks, series_of, view_history
from sdopt.perf.night.bridge import find_bridge_commit, last_good
from tests.planted_runs import ENVIRONMENT, NEWER_ENVIRONMENT, make_key, make_nights, make_run

KEY = make_key()
GPU = GpuRecord(name="A GPU", generation="sm89", memory_bytes=24 << 30, driver="580.65", cuda="13.0")


def fingerprint(cores: int = 2, memory_bytes: int = 24 << 30, **changes: Any) -> str:
    return fingerprint_of(ENVIRONMENT.model_copy(update=changes), cores, memory_bytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"system": "Linux aarch64"}}, "system Linux x86_64 -> Linux aarch64"),
        ({"environment": {"processor": "Another"}}, "processor A processor -> Another"),
        ({"environment": {"cpu_features": ()}}, "processor features avx2 -> none"),
        ({"environment": {"python": "3.12.1"}}, "Python 3.11 -> 3.12"),
        ({"environment": {"libraries": {"torch": "2.13", "openvino": "2026.0"}}}, "torch 2.12 -> 2.13"),
        ({"environment": {"libraries": {"torch": "2.12"}}}, "openvino 2026.0 -> none"),
        ({"environment": {"gpus": (GPU,)}}, "GPU none -> A GPU"),
        ({"logical_cores": 4}, "logical cores 2 -> 4"),
        ({"memory_bytes": 32 << 30}, "memory GiB 24 -> 32"),
    ],
)
def test_what_decides_speed_opens_a_series_and_is_named(changes: dict[str, Any], words: str) -> None:
    before = make_run(0, {KEY: 1e8})
    if "environment" in changes:
        changes = {"environment": ENVIRONMENT.model_copy(update=changes["environment"])}
    after = make_run(1, {KEY: 1e8}, **changes)
    assert before.fingerprint != after.fingerprint
    assert describe_change(before, after) == (words,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"driver": "590.10"}, "NVIDIA driver 580.65 -> 590.10"),
        ({"cuda": "13.1"}, "memory, generation or CUDA of A GPU"),
        ({"memory_bytes": 48 << 30}, "memory, generation or CUDA of A GPU"),
    ],
)
def test_a_gpu_is_followed_by_its_driver(change: dict[str, Any], words: str) -> None:
    runs = [
        make_run(night, {KEY: 1e8}, environment=ENVIRONMENT.model_copy(update={"gpus": (gpu,)}))
        for night, gpu in enumerate((GPU, GPU.model_copy(update=change)))
    ]
    assert runs[0].fingerprint != runs[1].fingerprint
    assert describe_change(*runs) == (words,)


def test_which_of_two_gpus_changed_is_said() -> None:
    newer = GPU.model_copy(update={"driver": "590.10"})
    runs = [
        make_run(night, {KEY: 1e8}, environment=ENVIRONMENT.model_copy(update={"gpus": gpus}))
        for night, gpus in enumerate(((GPU, GPU), (GPU, newer)))
    ]
    assert describe_change(*runs) == ("NVIDIA driver of GPU 1 580.65 -> 590.10",)


def test_what_does_not_decide_speed_opens_none() -> None:
    same = fingerprint()
    assert same == fingerprint(sdopt="9.9")
    assert same == fingerprint(python="3.11.13")
    assert same == fingerprint(memory_bytes=(24 << 30) - (80 << 20))
    assert same == fingerprint(libraries=dict(reversed(ENVIRONMENT.libraries.items())))
    assert len(same) == 16
    assert int(same, 16) >= 0


def test_series_never_cross_a_fingerprint() -> None:
    old = make_nights(3, {KEY: 1e8})
    new = make_nights(2, {KEY: 2e8}, first=3, environment=NEWER_ENVIRONMENT)
    back = make_nights(1, {KEY: 3e8}, first=5)
    records = [*old, *new, *back]
    assert [point.value for point in series_of(records, old[0].fingerprint, KEY)] == [1e8, 1e8, 1e8, 3e8]
    assert [point.run for point in series_of(records, new[0].fingerprint, KEY)] == [3, 4]
    assert series_of(records, old[0].fingerprint, make_key(Metric.PSNR)) == ()
    view = view_history(HistoryContents(tuple(records)))
    assert [[point.run for point in part] for part in view.split(KEY)] == [[0, 1, 2, 5], [3, 4]]
    assert describe_breaks(view.runs) == {3: "torch 2.12 -> 2.13"}


def test_another_suite_is_another_series() -> None:
    records = (make_run(0, {KEY: 1e8}), make_run(1, {KEY: 5e8}, suite_digest="00" * 32))
    view = view_history(HistoryContents(records))
    assert len(view.split(KEY)) == 2
    assert describe_breaks(view.runs) == {1: "the suite was edited"}


def test_a_new_environment_asks_for_the_last_good_commit() -> None:
    good, alarmed = make_run(0, {KEY: 1e8}, commit="a" * 40), make_run(1, {KEY: 2e8}, commit="b" * 40, verdict="alarm")
    uncommitted = make_run(2, {KEY: 1e8}, commit="c" * 40, changed=True)
    records = [good, alarmed, uncommitted]
    newer = make_run(3, {KEY: 1e8}, environment=NEWER_ENVIRONMENT, commit="d" * 40)
    place = (newer.fingerprint, newer.suite_digest)
    assert find_bridge_commit(records, *place, newer.commit) == good.commit
    assert find_bridge_commit(records, *place, good.commit) == ""
    assert find_bridge_commit(records, good.fingerprint, good.suite_digest, newer.commit) == ""
    assert find_bridge_commit([*records, newer], *place, newer.commit) == ""
    assert find_bridge_commit([alarmed, uncommitted], *place, newer.commit) == ""
    assert find_bridge_commit(records, newer.fingerprint, "00" * 32, newer.commit) == ""


def test_the_last_good_run_is_the_newest_of_all_environments() -> None:
    old = make_nights(2, {KEY: 1e8})
    bridge = make_run(2, {KEY: 1e8}, environment=NEWER_ENVIRONMENT, kind=RunKind.BRIDGE, verdict="")
    bad = make_run(3, {KEY: 2e8}, environment=NEWER_ENVIRONMENT, verdict="alarm")
    digest = old[0].suite_digest
    assert last_good([*old, bridge, bad], digest) == bridge
    assert last_good([*old, bad], digest) == find_last_good(old, old[-1])
    assert last_good([bad], digest) is None
