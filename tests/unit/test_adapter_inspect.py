"""`sdopt inspect` on adapters: what they are, and whether a bundle takes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from sdopt.adapters.adapter_file import read_adapter_file
from sdopt.bundle.manifest import write_manifest
from sdopt.cli.main import cli
from sdopt.errors import AdapterError, UsageError
from sdopt.library.adapter_fit import BundleSlots, describe_fit
from sdopt.model.family import Family
from sdopt.model.slots import SlotSet
from tests.adapters import (
    TEXT,
    UNET,
    Networks,
    Pairs,
    is_attention,
    kohya_name,
    make_networks,
    make_pairs,
    write_pairs,
    write_state,
)  # fmt: skip
from tests.reference_session import make_bundle
from tests.slotted_bundle import add_slots_to, write_lora

TRAINING = {
    "ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_output_name": "inkwash",
    "ss_tag_frequency": json.dumps({"10_inkwash": {"ink": 20, "\x1b[2Jcastle": 9}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def sd1() -> Networks:
    return make_networks(Family.SD1)


@pytest.fixture(scope="module")
def pairs(sd1: Networks) -> Pairs:
    return make_pairs(sd1, is_attention)


def show(*words: object) -> Any:
    return CliRunner().invoke(cli, ["inspect", *map(str, words)], env={"COLUMNS": "100"}, catch_exceptions=False)


def test_a_lora_is_a_page(pairs: Pairs, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "ink.safetensors", pairs, kohya_name, metadata=TRAINING)
    page = " ".join(show(path).stderr.split())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for words in (
        f"{path} is a LoRA for Stable Diffusion 1", "named inkwash", "trigger words inkwash, ink", "written by kohya",
        "rank 4 to 5", "ink (20)", digest, f"unet │ {len(pairs[UNET])}", f"text_encoder │ {len(pairs[TEXT])}",
    ):  # fmt: skip
        assert words in page
    assert "\x1b" not in page
    table = json.loads(show(path, "--json").stdout)
    assert (table["kind"], table["adapter_kind"], table["family"]) == ("adapter", "LoRA", "sd1")
    assert (table["sha256"], table["bytes"]) == (digest, path.stat().st_size)
    assert "fit" not in table


@pytest.fixture
def bundle(sd1: Networks, tmp_path: Path) -> Path:
    made = make_bundle(tmp_path / "bundle")
    folder = made.folder
    write_manifest(folder, made.manifest)
    for name, module in sd1.modules.items():
        (folder / name).mkdir(exist_ok=True)
        write_state(folder / name / "weights.safetensors", module.state_dict())
    return folder


def test_a_bundle_without_slots_says_so(pairs: Pairs, bundle: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "ink.safetensors", pairs, kohya_name)
    many = sum(map(len, pairs.values()))
    page = " ".join(show(path, "--for", bundle).stderr.split())
    assert f"takes it? no: the model has all {many} layers that it changes, and this bundle has no LoRA slots" in page
    assert "--lora-slots all:64" in page


def test_a_bundle_with_slots_takes_it_or_says_why_not(
    sd1: Networks, pairs: Pairs, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pairs(tmp_path / "ink.safetensors", pairs, kohya_name)
    slots = BundleSlots(sd1.layers, 8)
    monkeypatch.setattr("sdopt.library.adapter_fit.find_slots", lambda manifest: slots)
    assert json.loads(show(path, "--for", bundle, "--json").stdout)["fit"]["taken"]
    assert "takes it? yes" in " ".join(show(path, "--for", bundle).stderr.split())
    monkeypatch.setattr("sdopt.library.adapter_fit.find_slots", lambda manifest: BundleSlots(sd1.layers, 4))
    fit = json.loads(show(path, "--for", bundle, "--json").stdout)["fit"]
    assert not fit["taken"]
    assert "has rank 5, and the slots hold 4" in fit["reason"]
    foreign = write_pairs(tmp_path / "xl.safetensors", make_pairs(make_networks(Family.SDXL), is_attention), kohya_name)
    assert "is made for SDXL" in json.loads(show(foreign, "--for", bundle, "--json").stdout)["fit"]["reason"]


def test_damage_and_questions_that_make_no_sense(pairs: Pairs, bundle: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "ink.safetensors", pairs, kohya_name)
    state = load_file(path)
    del state[min(key for key in state if "lora_up" in key)]
    with pytest.raises(AdapterError, match="is not whole: its up is missing"):
        show(write_state(path, state))
    with pytest.raises(UsageError, match="is not an adapter, and --for asks"):
        show(bundle, "--for", bundle)


def test_the_slots_are_those_of_the_manifest(pristine_bundle: Path, tmp_path: Path) -> None:
    file = read_adapter_file(write_lora(tmp_path / "ink.safetensors", pristine_bundle, 1))
    wide = add_slots_to(pristine_bundle, tmp_path / "wide")
    assert describe_fit(file, wide)["taken"] is True
    narrow = add_slots_to(pristine_bundle, tmp_path / "narrow", SlotSet.ATTENTION)
    answer = describe_fit(file, narrow)
    assert answer["taken"] is False
    assert "slot" in answer["reason"]
    low = add_slots_to(pristine_bundle, tmp_path / "low", rank=3)
    assert "rank" in describe_fit(file, low)["reason"]
