"""Single files that are missing, damaged, of another kind, or that want to run code."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import uuid
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdopt.checkpoint.pickle_sandbox import convert_pickle
from sdopt.checkpoint.source import open_checkpoint
from sdopt.checkpoint.tokenizer import END_OF_TEXT, EXCLAMATION, write_clip_tokenizer
from sdopt.errors import CheckpointError, SdoptError, UnsafeInputError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.processes.call import call_by_name
from sdopt.weights.safetensors_header import read_header
from tests.checkpoints import make_model, read_tensor, small_recipe, to_original, write_hollow_file, write_single_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_raw(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def entry(begin: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "no.safetensors"), "no-such-model", "a/b/c.ckpt", "a/b.ckpt"):
        with pytest.raises(CheckpointError, match="there is no file or folder"):
            open_checkpoint(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link to nothing"):
        open_checkpoint(str(tmp_path / "dangling"))


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = json.dumps({"a": entry(0, 2, [1])})
    twice = f"{one[:-1]}, {one[1:]}"
    overlap = json.dumps({"a": entry(0, 4, [2]), "b": entry(2, 6, [2])})
    cases = {
        "is there twice": (twice, b"\0\0"),
        "overlaps": (overlap, bytes(6)),
        "truncated": (json.dumps({"a": entry(0, 8, [4])}), bytes(4)),
        "has the shape": (json.dumps({"a": entry(0, 2, [-1])}), b"\0\0"),
        "unnamed bytes": (json.dumps({"a": entry(0, 2, [1])}), bytes(8)),
        "should have": (json.dumps({"a": entry(0, 8, [1])}), bytes(8)),
    }
    for message, (header, data) in cases.items():
        with pytest.raises(SdoptError, match=message) as caught:
            open_checkpoint(str(write_raw(path, header, data)))
        # A download that broke off is damaged. A header that contradicts itself may be made so.
        assert caught.value.exit_code == (1 if message == "truncated" else 4)
        assert caught.value.hint == "download it again" or message in ("is there twice", "overlaps", "should have")
    for raw in (b"", b"abc", b"\xff" * 64, b"<html>not found</html>"):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            open_checkpoint(str(path))
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="GGUF"):
        open_checkpoint(str(path))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_give_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    # Pickles and zip archives go to the sandbox, which costs a process each.
    path.write_bytes(b"\x10" + raw)
    with pytest.raises(SdoptError):
        open_checkpoint(str(path))


KINDS = {
    "LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight"],
    "textual inversion": ["emb_params"],
    "VAE alone, with a prefix": ["first_stage_model.decoder.conv_in.weight"],
    "VAE alone": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "UNet alone, in diffusers' layout": ["down_blocks.0.resnets.0.conv1.weight"],
    "text encoder alone": ["text_model.final_layer_norm.weight"],
    "upscaler": ["params_ema.conv_first.weight"],
    "no UNet of Stable Diffusion": ["something.else"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "stable-diffusion-v1-5.safetensors"
    save_file({name: torch.zeros(2, 2) for name in KINDS[kind]}, file)
    with pytest.raises(CheckpointError, match=kind.partition(", with")[0]) as caught:
        open_checkpoint(str(file))
    assert caught.value.hint


def test_a_file_that_lacks_a_part_or_has_an_odd_one(tmp_path: Path) -> None:
    state = to_original(make_model(small_recipe(Family.SD1)))

    def open_changed(changed: dict[str, torch.Tensor]) -> None:
        open_checkpoint(str(write_single_file(tmp_path / "x.safetensors", changed)))

    with pytest.raises(CheckpointError, match="lacks the text encoder that sd1 needs"):
        open_changed({key: value for key, value in state.items() if not key.startswith("cond_stage")})
    resnet = "model.diffusion_model.input_blocks.1.0.out_layers.3."
    with pytest.raises(CheckpointError, match=r"no resnet at input_blocks\.1\.0"):
        open_changed({key: value for key, value in state.items() if not key.startswith(resnet)})
    gate = "model.diffusion_model.middle_block.2.in_layers.2.bias"
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: mid_block\.resnets\.1\.conv1\.bias"):
        open_changed({key: value for key, value in state.items() if key != gate})
    with pytest.raises(CheckpointError, match=r"does not explain: 1 tensor: input_hint_block\.0\.weight"):
        open_changed({**state, "model.diffusion_model.input_hint_block.0.weight": torch.zeros(1)})
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    with pytest.raises(CheckpointError, match=r"takes 8 channels .* InstructPix2Pix"):
        open_changed({**state, conv: torch.zeros(32, 8, 3, 3, dtype=torch.float16)})
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    with pytest.raises(CheckpointError, match="knows 100 tokens"):
        open_changed({**state, key: state[key][:100]})


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL])
def test_any_set_of_tensors_is_read_or_refused(tmp_path: Path, family: Family) -> None:
    state = to_original(make_model(small_recipe(family), device="meta"))
    choose = random.Random(0)
    modules = sorted({key.rpartition(".")[0] for key in state} - {""})
    for _ in range(15):
        dropped = tuple(choose.sample(modules, choose.randint(0, 2)))
        changed = {key: value for key, value in state.items() if not dropped or not key.startswith(dropped)}
        for key in choose.sample(sorted(changed), choose.randint(0, 2)):
            shape = [choose.randint(0, 96) for _ in range(choose.randint(0, 4))]
            changed[key] = torch.empty(shape, dtype=torch.float16, device="meta")
        needed = all(key in changed and changed[key].shape == state[key].shape for key in state)
        try:
            open_checkpoint(str(write_hollow_file(tmp_path / "x.safetensors", changed)))
        except CheckpointError:
            assert not needed


def test_a_ckpt_file_is_read_as_its_tensors(tmp_path: Path, cache: Path) -> None:
    model = make_model(small_recipe(Family.SD1))
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": to_original(model), "global_step": 840000}, path)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.source.kind == "single-file"
    tensors = checkpoint.components[ComponentName.UNET].tensors
    assert all(torch.equal(read_tensor(ref), model.unet[key]) for key, ref in tensors.items())
    (converted,) = (cache / "pickles").iterdir()
    before = converted.stat().st_mtime_ns
    open_checkpoint(str(path))
    assert converted.stat().st_mtime_ns == before


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["archive", "legacy", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, how: str) -> None:
    path, planted = tmp_path / "evil.ckpt", tmp_path / "planted"
    harmful = {"state_dict": {"a": torch.zeros(2)}, "x": Evil(f"touch {planted}")}
    if how == "bare":
        path.write_bytes(pickle.dumps(harmful["x"], protocol=2))
    else:
        torch.save(harmful, path, _use_new_zipfile_serialization=how == "archive")
    with pytest.raises(UnsafeInputError, match="nothing of it was run") as caught:
        open_checkpoint(str(path))
    assert caught.value.exit_code == 4
    assert not planted.exists()
    assert not list((tmp_path / "cache" / "pickles").iterdir())


HARMLESS = {
    "namespace": argparse.Namespace(lr=1e-4, name="x", nested=argparse.Namespace(a=[1])),
    "path": PurePosixPath("/data/model"), "windows path": PureWindowsPath("C:/data"),
    "defaultdict": defaultdict(list, {"a": [1, 2]}), "counter": Counter("abca"),
    "datetime": datetime(2024, 1, 2, 3, tzinfo=UTC), "date": date(2024, 1, 2), "timedelta": timedelta(days=3),
    "ordered dicts": OrderedDict(a=OrderedDict(b=OrderedDict(c=1))), "uuid": uuid.UUID(int=7),
    "decimal": Decimal("1.5"), "fraction": Fraction(1, 3), "sets": {1, 2}, "frozen": frozenset({3}),
    "complex": 1 + 2j, "slice": slice(1, 2), "range": range(3),
    "numpy": np.float64(0.5), "array": np.arange(3), "size": torch.Size([1, 2]), "dtype": torch.float16,
    "device": torch.device("cpu"), "typing": Any, "deque": deque([1, 2], maxlen=3), "user's dict": UserDict(a=1),
    "chain": ChainMap({"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("how", ["archive", "legacy"])
def test_harmless_objects_beside_the_tensors_are_inert(tmp_path: Path, how: str) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    path = tmp_path / "x.ckpt"
    torch.save(
        {"hyper_parameters": HARMLESS, "state_dict": tensors}, path, _use_new_zipfile_serialization=how == "archive"
    )
    found = read_header(convert_pickle(path)).tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(read_tensor(found[key]), tensors[key]) for key in tensors)


@pytest.mark.parametrize("how", ["archive", "legacy", "bare"])
def test_a_newer_protocol_is_said_to_be_one_and_is_still_searched_for_calls(tmp_path: Path, how: str) -> None:
    def save(value: object) -> Path:
        path = tmp_path / "x.ckpt"
        if how == "bare":
            path.write_bytes(pickle.dumps(value, protocol=4))
        else:
            torch.save(value, path, pickle_protocol=4, _use_new_zipfile_serialization=how == "archive")
        return path

    plain = {"a": torch.zeros(2), "counts": Counter("ab"), "path": PurePosixPath("/x")}
    with pytest.raises(CheckpointError, match="has protocol 4, which is not read") as caught:
        convert_pickle(save({"a": 1} if how == "bare" else plain))
    assert "pickle_protocol=2" in caught.value.hint
    with pytest.raises(UnsafeInputError, match="nothing of it was run"):
        convert_pickle(save({**plain, "x": Evil("true")}))


def test_bytes_that_are_no_pickle_are_not_called_unsafe(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x00\x01" * 40)
    with pytest.raises(CheckpointError, match="is not a pickle that torch wrote"):
        convert_pickle(tmp_path / "x.bin")


class Call:
    """Pickled as a call of `function`: what a stand-in must never let through."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("how", ["archive", "legacy"])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, __import__, open, functools.partial, subprocess.Popen]
)
def test_no_call_is_let_through_beside_harmless_objects(tmp_path: Path, how: str, function: Any) -> None:
    planted = tmp_path / "planted"
    arguments = (os.system, f"touch {planted}") if function is functools.partial else (f"touch {planted}",)
    harmful = {
        "state_dict": {"a": torch.zeros(2)}, "path": PurePosixPath("/x"), "counts": Counter("ab"),
        "nested": OrderedDict(inner=[argparse.Namespace(deep=Call(function, *arguments))]),
    }  # fmt: skip
    path = tmp_path / "x.ckpt"
    torch.save(harmful, path, _use_new_zipfile_serialization=how == "archive")
    with pytest.raises(UnsafeInputError, match="nothing of it was run"):
        convert_pickle(path)
    assert not planted.exists()


def test_a_small_pickle_that_names_a_huge_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeInputError, match="names tensors of 4398046511104"):
        convert_pickle(tmp_path / "x.ckpt")


def test_damaged_pickles(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "x.ckpt")
    raw = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "y.ckpt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        convert_pickle(tmp_path / "y.ckpt")
    torch.save([1, 2], tmp_path / "z.ckpt")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        convert_pickle(tmp_path / "z.ckpt")


def test_tensors_of_every_layout_survive_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    state = {
        "view": base.t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "row": base[1],
        "int": torch.arange(3),
    }
    # Published files hold objects of their trainer; it need not be installed to read them.
    module = types.ModuleType("pytorch_lightning")
    module.Callback = type("Callback", (), {"__module__": "pytorch_lightning"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    torch.save(
        {"state_dict": state, "callbacks": {module.Callback: {"best": 1}}, "o": module.Callback()},
        tmp_path / "x.ckpt",
    )
    converted = convert_pickle(tmp_path / "x.ckpt")
    read_header(converted)
    found = load_file(converted)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype for key in state)


def test_the_hook_refuses_programs_sockets_and_writing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    arguments = {"planted": str(tmp_path / "planted"), "kept": str(tmp_path / "kept")}
    outcome = call_by_name("tests.sandbox_escape:try_to_escape", arguments)
    assert outcome.value == {"escaped": [], "read": "kept"}
    assert not (tmp_path / "planted").exists()


def test_the_tokenizer_is_clips() -> None:
    from transformers import CLIPTokenizer

    for pad, identity in ((END_OF_TEXT, 49407), (EXCLAMATION, 0)):
        tokenizer = CLIPTokenizer.from_pretrained(write_clip_tokenizer(pad))
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (49408, identity, 77)
