"""Adapter files that are damaged, hostile, something else or for another model: an error that says which and why."""

from __future__ import annotations

import json
import pickle
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sdopt.adapters.adapter_file import read_adapter_file
from sdopt.adapters.merge import weight_changes
from sdopt.adapters.resolve import resolve_adapter
from sdopt.errors import AdapterError, SdoptError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from tests.adapters import (
    TEXT,
    TEXT_2,
    UNET,
    Layers,
    Networks,
    is_attention,
    is_transformer,
    kohya_name,
    make_networks,
    make_pairs,
    write_pairs,
    write_state,
)  # fmt: skip

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = kohya_name(UNET, LAYER)
LAYERS: Layers = {UNET: {LAYER: (32, 32), "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3)}}


@pytest.fixture(scope="module")
def sd1() -> Networks:
    return make_networks(Family.SD1)


def pair(rank: int = 4, out: int = 32, columns: int = 32, stem: str = STEM) -> dict[str, Tensor]:
    return {f"{stem}.lora_down.weight": torch.ones(rank, columns), f"{stem}.lora_up.weight": torch.ones(out, rank)}


def refuse(path: Path, layers: Layers = LAYERS, **options: Any) -> SdoptError:
    with pytest.raises(SdoptError) as caught:
        resolve_adapter(read_adapter_file(path), layers, **({"slots": None, "rank_limit": None} | options))
    assert caught.value.hint
    return caught.value


def test_half_a_pair(tmp_path: Path) -> None:
    for part in ("lora_down.weight", "lora_up.weight"):
        state = {key: value for key, value in pair().items() if not key.endswith(part)}
        error = refuse(write_state(tmp_path / "a.safetensors", state))
        assert f"{STEM} is not whole: its {part[5:-7]} is missing" in error.message
    error = refuse(write_state(tmp_path / "a.safetensors", pair() | {"lora_unet_x.alpha": torch.ones(())}))
    assert "lora_unet_x is not whole: it has alpha alone" in error.message
    hada = {f"{STEM}.hada_w{n}_{ab}": torch.ones(32, 32) for n in (1, 2) for ab in "ab"}
    error = refuse(write_state(tmp_path / "a.safetensors", pair() | hada))
    assert "is both a LoHa and a LoRA" in error.message


@pytest.mark.parametrize(
    "state",
    [
        {f"{STEM}.lora_down.weight": torch.ones(4, 32), f"{STEM}.lora_up.weight": torch.ones(32, 5)},
        {f"{STEM}.lora_down.weight": torch.ones(4), f"{STEM}.lora_up.weight": torch.ones(32, 4)},
        {f"{STEM}.lora_down.weight": torch.ones(0, 32), f"{STEM}.lora_up.weight": torch.ones(32, 0)},
        pair() | {f"{STEM}.lora_mid.weight": torch.ones(4, 3, 3, 3)},
        {f"{STEM}.hada_w{n}_a": torch.ones(32, 2 * n) for n in (1, 2)}
        | {f"{STEM}.hada_w{n}_b": torch.ones(2 * n, 32 * n) for n in (1, 2)},
        {f"{STEM}.lokr_w1": torch.ones(4, 4, 1), f"{STEM}.lokr_w2": torch.ones(8, 8)},
        {f"{STEM}.diff": torch.ones(2, 2, 2)},
    ],
)
def test_shapes_that_contradict_each_other(tmp_path: Path, state: dict[str, Tensor]) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", state))
    assert f"the shapes of {STEM} contradict each other" in error.message


def test_numbers_that_are_none(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf")):
        for key in pair():
            state = pair()
            state[key][1, 1] = bad
            error = refuse(write_state(tmp_path / "a.safetensors", state))
            assert f"NaN or infinity in {STEM}" in error.message
        error = refuse(write_state(tmp_path / "a.safetensors", pair() | {f"{STEM}.alpha": torch.tensor(bad)}))
        assert f"NaN or infinity in {STEM}" in error.message
    difference = torch.full((32, 32), float("nan"))
    refuse(write_state(tmp_path / "a.safetensors", {f"{STEM}.diff": difference}))
    # Numbers whose squares are too large for fp32 are sound.
    path = write_state(tmp_path / "a.safetensors", {key: value * 1e18 for key, value in pair().items()})
    resolve_adapter(read_adapter_file(path), LAYERS, slots=None, rank_limit=None)


def test_alpha_and_types(tmp_path: Path) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", pair() | {f"{STEM}.alpha": torch.ones(2)}))
    assert "is not a number: [2]" in error.message
    path = write_state(tmp_path / "a.safetensors", pair() | {f"{STEM}.alpha": torch.tensor(2)})
    (found,) = resolve_adapter(read_adapter_file(path), LAYERS, slots=None, rank_limit=None).layers[UNET].values()
    assert float(found.up[0, 0]) == 0.5
    error = refuse(write_state(tmp_path / "a.safetensors", {key: value.char() for key, value in pair().items()}))
    assert "is stored as int8" in error.message


def test_a_file_for_sdxl_on_sd1(sd1: Networks, tmp_path: Path) -> None:
    xl = make_networks(Family.SDXL)
    pairs = make_pairs(xl, is_attention)
    path = write_pairs(tmp_path / "ink.safetensors", pairs, lambda part, name: kohya_name(part, name, xl=True))
    error = refuse(path, sd1.layers)
    assert error.message == (
        "ink.safetensors is made for SDXL: the model is of another family, whose text is 64 numbers wide a token and "
        "not 128"
    )
    assert shlex.split(error.hint)[-3:] == ["sdopt", "inspect", str(path)]
    text = {part: layers for part, layers in pairs.items() if part != UNET}
    path = write_pairs(tmp_path / "ink.safetensors", text, lambda part, name: kohya_name(part, name, xl=True))
    assert "is made for SDXL: it changes a second text encoder" in refuse(path, sd1.layers).message
    pairs = make_pairs(sd1, is_attention)
    assert "the model is SDXL, whose text is 128" in refuse(
        write_pairs(tmp_path / "ink.safetensors", pairs, kohya_name), xl.layers
    ).message  # fmt: skip


def real_layers(text: int, *components: ComponentName) -> Layers:
    """Two layers of the size of a published model."""
    layers: Layers = {UNET: {LAYER: (320, 320), LAYER.replace("attn1.to_q", "attn2.to_k"): (320, text)}}
    return layers | {component: {"encoder.layers.0.self_attn.q_proj": (768, 768)} for component in components}


def test_published_families_are_named(tmp_path: Path) -> None:
    stem = STEM.replace("attn1_to_q", "attn2_to_k")
    for width, label in {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}.items():
        path = write_state(tmp_path / "a.safetensors", pair(out=320, columns=width, stem=stem))
        for other, model in {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}.items():
            layers = real_layers(other, TEXT, *[TEXT_2] * (other == 2048))
            if other == width:
                resolve_adapter(read_adapter_file(path), layers, slots=None, rank_limit=None)
            else:
                error = refuse(path, layers)
                assert error.message.startswith(f"a.safetensors is made for {label}: the model is {model}, whose text")


def test_the_refiner_has_the_second_text_encoder_alone(tmp_path: Path) -> None:
    """Which trainers then call the only one."""
    layer = "encoder.layers.0.self_attn.q_proj"
    path = write_state(tmp_path / "a.safetensors", pair(out=1280, columns=1280, stem=kohya_name(TEXT, layer)))
    layers: Layers = {UNET: {LAYER: (384, 384)}, TEXT_2: {f"text_model.{layer}": (1280, 1280)}}
    adapter = resolve_adapter(read_adapter_file(path), layers, slots=None, rank_limit=None)
    assert {part: list(found) for part, found in adapter.layers.items()} == {TEXT_2: [f"text_model.{layer}"]}


def test_layers_that_the_model_does_not_have(sd1: Networks, tmp_path: Path) -> None:
    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(
        tmp_path / "a.safetensors", pairs, lambda part, name: f"lora_unet_other_{name.replace('.', '_')}"
    )
    total = sum(map(len, pairs.values()))
    message = refuse(path, sd1.layers).message
    assert f"changes {total} layers, and the model has none of them, among them lora_unet_other_" in message
    state = load_file(write_pairs(path, pairs, kohya_name)) | pair(stem="lora_unet_down_blocks_7_x")
    message = refuse(write_state(path, state), sd1.layers).message
    assert (
        f"changes {total + 1} layers, and the model does not have 1 of them, among them lora_unet_down_blocks_7"
        in message
    )
    flux = pair(stem="lora_unet_double_blocks_0_img_attn_qkv")
    assert "is made for a diffusion transformer such as Flux" in refuse(write_state(path, flux), sd1.layers).message


def test_another_shape_and_the_same_layer_twice(tmp_path: Path) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", pair(columns=16)))
    assert "1 layer has another shape than the model's" in error.message
    assert "the model's weight is [32, 32], and the file changes one of [32, 16] as a matrix" in error.message
    twice = pair() | pair(stem="lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q")
    layers: Layers = {UNET: {**LAYERS[UNET], "down_blocks.0.attentions.0.proj_in": (32, 32)}}
    assert "changes unet's" in refuse(write_state(tmp_path / "a.safetensors", twice), layers).message
    same = {f"{STEM}.lora_A.weight": torch.ones(4, 32), **pair()}
    assert "two tensors for the down" in refuse(write_state(tmp_path / "a.safetensors", same)).message


def test_slots_and_ranks(sd1: Networks, tmp_path: Path) -> None:
    pairs = make_pairs(sd1, is_transformer)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name)
    slots = {part: [name for name in layers if is_attention(name)] for part, layers in sd1.layers.items()}
    lacking = sum(not is_attention(name) for layers in pairs.values() for name in layers)
    error = refuse(path, sd1.layers, slots=slots)
    assert f"{lacking} layers have no slot in the engines, among them" in error.message
    assert error.hint == "build slots for them: sdopt convert MODEL --lora-slots all:64"
    assert "the engines have no LoRA slots" in refuse(path, sd1.layers, slots={}).message
    error = refuse(path, sd1.layers, slots=sd1.layers, rank_limit=4)
    assert "has rank 5, and the slots hold 4: " in error.message
    assert "--lora-slots all:5" in error.hint


def test_pairs_that_change_nothing_may_lack_a_layer_or_a_slot(sd1: Networks, tmp_path: Path) -> None:
    """ComfyUI's extraction writes them."""
    pairs = make_pairs(sd1, is_attention)
    path = write_pairs(tmp_path / "a.safetensors", pairs, kohya_name)
    slotless = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    nothing = pair(stem="lora_te_text_projection") | pair(out=128, columns=64, stem=slotless)
    for key in nothing:
        if "up" in key:
            nothing[key] = torch.zeros_like(nothing[key])
    path = write_state(path, load_file(path) | nothing)
    slots = {part: [name for name in layers if is_attention(name)] for part, layers in sd1.layers.items()}
    adapter = resolve_adapter(read_adapter_file(path), sd1.layers, slots=slots, rank_limit=8)
    assert {part: set(layers) for part, layers in adapter.layers.items()} == {
        part: set(layers) for part, layers in pairs.items()
    }


@pytest.mark.parametrize(
    ("keys", "words", "hint"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion checkpoint", "sdopt convert"),
        (["encoder.down.0.block.0.conv1.weight"], "a VAE alone", "--vae"),
        (["emb_params"], "a textual inversion embedding", ""),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet", ""),
        (["lora_controlnet", "input_blocks.0.0.up"], "a Control-LoRA, which is a ControlNet", ""),
        (["ip_adapter.0.to_q_lora.down.weight", "image_proj.norm.weight"], "an IP-Adapter", ""),
        (["something.else"], "a file of other tensors", ""),
    ],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path: Path, keys: list[str], words: str, hint: str) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", {key: torch.ones(4, 4) for key in keys}))
    assert f"is not an adapter: it is {words}" in error.message
    assert hint in error.hint


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", {f"{STEM}.oft_blocks": torch.ones(2, 4, 4)}))
    assert "is an OFT, and sdopt reads LoRA, LoCon" in error.message
    error = refuse(write_state(tmp_path / "a.safetensors", pair() | {"strange": torch.ones(1)}))
    assert "1 of its 3 tensors are not parts of an adapter, among them 'strange'" in error.message


def test_a_pickle_comes_with_the_command_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old lora.pt"
    torch.save(pair(), path)
    error = refuse(path)
    assert "is a pickle" in error.message
    python, flag, code, *arguments = shlex.split(error.hint.removeprefix("convert it: "))
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr("sys.argv", ["-c", *arguments])
    exec(code, {})
    adapter = resolve_adapter(
        read_adapter_file(path.with_suffix(".safetensors")), LAYERS, slots=None, rank_limit=None
    )  # fmt: skip
    assert adapter.rank == 4
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle" in refuse(path).message


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "cannot read" in refuse(tmp_path / "none.safetensors").message
    assert "is a folder without" in refuse(tmp_path).message
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(SdoptError, match="is not a safetensors file"):
        read_adapter_file(tmp_path / "a.safetensors")


def write_header(path: Path, entries: str, data_bytes: int = 0) -> Path:
    raw = entries.encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data_bytes)
    return path


def test_a_million_names_are_refused_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr("sdopt.adapters.header.read_header", never)
    for many, word in ((25_000, "data_offsets"), (60_000, "data\\u005foffsets"), (1_000_000, "data_offsets")):
        entries = ",".join(f'"{i}":{{"dtype":"F16","shape":[0],"{word}":[0,0]}}' for i in range(many))
        error = refuse(write_header(tmp_path / "a.safetensors", f"{{{entries}}}"))
        assert "is not an adapter: its header is larger than one needs" in error.message


# Sound layers of each kind, for a weight [32, 32]; the fuzz changes shapes, numbers and types, and leaves parts out.
KINDS: tuple[dict[str, tuple[int, ...]], ...] = (
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "alpha": (), "dora_scale": (32, 1)},
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "lora_mid.weight": (4, 4, 1, 1), "diff_b": (32,)},
    {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "alpha": ()},
    {"hada_w1_a": (2, 32), "hada_w1_b": (2, 32), "hada_w2_a": (2, 32), "hada_w2_b": (2, 32),
     "hada_t1": (2, 2, 1, 1), "hada_t2": (2, 2, 1, 1)},
    {"lokr_w1": (4, 4), "lokr_w2": (8, 8), "alpha": ()},
    {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 8), "lokr_t2": (2, 2, 1, 1)},
    {"diff": (32, 32), "diff_b": (32,)},
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_in_a_file_ends_in_pairs_or_in_an_error_of_ours(tmp_path_factory: Any, data: st.DataObject) -> None:
    odd = st.lists(st.sampled_from([0, 1, 2, 32]), max_size=5).map(tuple)
    rarely = st.integers(0, 15).map(lambda number: number == 0)
    state = {}
    for stem in data.draw(st.sets(st.sampled_from((STEM, "lora_unet_down_blocks_0_resnets_0_conv1", "x")), max_size=2)):
        for end, shape in data.draw(st.sampled_from(KINDS)).items():
            number = data.draw(st.sampled_from([0.0, float("nan"), 65504.0])) if data.draw(rarely) else 0.5
            dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.bfloat16]))
            if not data.draw(rarely):
                state[f"{stem}.{end}"] = torch.full(data.draw(odd) if data.draw(rarely) else shape, number, dtype=dtype)
    path = write_state(tmp_path_factory.mktemp("fuzz") / "a.safetensors", state)
    hint = "none"
    try:
        file = read_adapter_file(path)
        resolve_adapter(file, LAYERS, slots=None, rank_limit=8, error_limit=1.0)
        list(weight_changes(file, LAYERS, {}))
    except SdoptError as error:
        hint = error.hint
    assert hint


def test_names_and_ranks_without_measure(tmp_path: Path) -> None:
    error = refuse(write_state(tmp_path / "a.safetensors", {"x" * 500 + ".lora_up.weight": torch.ones(1)}))
    assert "a tensor whose name has 515 characters: xxx" in error.message
    entries = {
        f"{STEM}.lora_down.weight": {"dtype": "F16", "shape": [1 << 20, 0], "data_offsets": [0, 0]},
        f"{STEM}.lora_up.weight": {"dtype": "F16", "shape": [0, 1 << 20], "data_offsets": [0, 0]},
    }
    error = refuse(write_header(tmp_path / "a.safetensors", json.dumps(entries)))
    assert "a rank of 1048576" in error.message


def test_metadata_of_strangers_is_not_trusted(tmp_path: Path) -> None:
    nested = "[" * 50_000
    for table in ({"ss_tag_frequency": nested}, {"ss_tag_frequency": "{"}, {"ss_tag_frequency": '{"a": 3}'}):
        file = read_adapter_file(write_state(tmp_path / "a.safetensors", pair(), table))
        assert file.trigger_words == ()
    for malformed in ('{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}'):
        with pytest.raises(AdapterError, match=r"PEFT's settings unet.lora_alpha are malformed"):
            read_adapter_file(write_state(tmp_path / "a.safetensors", pair(), {"lora_adapter_metadata": malformed}))


def test_a_file_that_grows_shorter_between_header_and_numbers(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.safetensors", pair())
    file = read_adapter_file(path)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 100)
    with pytest.raises(AdapterError, match="was changed while it was read"):
        resolve_adapter(file, LAYERS, slots=None, rank_limit=None)


def test_no_tensor_is_read_for_the_header(tmp_path: Path) -> None:
    state = {key: torch.full_like(value, torch.nan) for key, value in pair().items()}
    path = write_state(tmp_path / "a.safetensors", state)
    assert read_adapter_file(path).ranks == (4, 4)


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    tags = {"10_inkwash style": {"ink": 40, "castle": 12, "1girl": 3}, "5_other": {"ink": 2}}
    path = write_state(tmp_path / "sdxl_lightning_4step_lora.safetensors", pair(), {
        "ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0", "ss_network_alpha": "8.0",
        "ss_output_name": "inkwash-v2", "modelspec.title": "Ink wash", "ss_tag_frequency": json.dumps(tags),
    })  # fmt: skip
    file = read_adapter_file(path)
    assert (file.writer, file.title, file.alias, file.network_alpha) == ("kohya", "Ink wash", "inkwash-v2", 8.0)
    assert file.trigger_words == ("inkwash style", "other", "ink")
    assert dict(file.tags) == {"ink": 42, "castle": 12, "1girl": 3}
    assert (file.family, file.few_step) == (Family.SDXL, "lightning")
    said = {"modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.trigger_phrase": "ohwx cat, blue"}
    file = read_adapter_file(write_state(tmp_path / "plain.safetensors", pair(), said))
    assert (file.family, file.trigger_words, file.few_step) == (Family.SD1, ("ohwx cat", "blue"), None)
    for name, kind in {
        "pytorch_lora_weights-LCM": "lcm", "Hyper-SD15-8steps-lora": "hyper", "TCD-SDXL-LoRA": "tcd",
        "dmd2_sdxl": "dmd2",
        "hyperrealism": None, "turbocharged": None, "sd_xl_turbo_lora_v1": "turbo",
    }.items():  # fmt: skip
        assert read_adapter_file(write_state(tmp_path / f"{name}.safetensors", pair())).few_step == kind
