"""What is not a checkpoint is named by what it is, with something to do next."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdopt.checkpoint.source import open_checkpoint
from sdopt.errors import CheckpointError
from sdopt.model.family import Family
from tests.checkpoints import make_model, small_recipe, to_original

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
FILES: dict[str, tuple[str, bytes, str, str]] = {
    "an LFS pointer": ("m.safetensors", LFS, "Git LFS pointer", "git lfs pull"),
    "an LFS pointer for a pickle": ("m.ckpt", LFS, "Git LFS pointer", "git lfs pull"),
    "a login page": ("m.safetensors", b"<!DOCTYPE html><html><head>", "web page", "log in"),
    "a page after blanks": ("m.ckpt", b"\n\n <html lang=en>", "web page", "log in"),
    "an error in JSON": ("m.safetensors", b'{"error": "gated"}', "JSON text", "download"),
    "a workflow": ("m.json", b'{"nodes": [], "links": []}', "workflow of ComfyUI", "checkpoint"),
    "a manifest": ("bundle.json", b'{"nodes": 3}', "manifest of a bundle", "folder"),
    "a shard index": ("model.safetensors.index.json", b'{"weight_map": {}}', "index of a model", "folder"),
    "a plain text": ("m.safetensors", b"Access denied\n", "a text", "diffusers folder"),
    "a config": ("v1-inference.yaml", b"model:\n  target: x\n", "a config", "safetensors"),
    "nothing": ("m.safetensors", b"", "is empty", "download"),
    "zeros": ("m.safetensors", bytes(9000), "zeros", "download"),
    "a part": ("m.safetensors.part", b"\x10" * 40, "not finished", "download"),
    "a browser's part": ("m.ckpt.crdownload", b"\x80\x02" * 40, "not finished", "download"),
    "GGUF": ("m.gguf", b"GGUF\x03\0\0\0" + bytes(40), "GGUF", "safetensors"),
    "GGUF by another name": ("m.safetensors", b"GGUF\x03\0\0\0" + bytes(40), "GGUF", "safetensors"),
    "Flax": ("m.msgpack", b"\x81\xa6params\x80", "Flax", "safetensors"),
    "HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5", "safetensors"),
    "an ONNX graph": ("m.onnx", b"\x08\x08\x12\x07pytorch\x00", "ONNX", "checkpoint"),
    "a plan": ("m.plan", b"ftrt\x01\x00\x00\xff", "TensorRT plan", "checkpoint"),
    "OpenVINO": ("m.xml", b'<?xml version="1.0"?>\n<net name="Model0">', "OpenVINO", "checkpoint"),
    "a PNG": ("m.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(40), "picture", "model"),
    "a JPEG": ("m.ckpt", b"\xff\xd8\xff\xe0" + bytes(40), "picture", "model"),
    "7z": ("m.7z", b"7z\xbc\xaf\x27\x1c" + bytes(40), "7z archive", "unpack"),
    "RAR": ("m.rar", b"Rar!\x1a\x07\x01\x00", "RAR archive", "unpack"),
    "gzip": ("m.tar.gz", b"\x1f\x8b\x08\x00" + bytes(40), "gzip archive", "unpack"),
    "a zip that ends early": ("m.ckpt", b"PK\x03\x04" + b"\x81" * 60, "cut off", "download"),
}


@pytest.mark.parametrize(("name", "data", "what", "next_"), FILES.values(), ids=FILES)
def test_a_file_is_named_by_its_first_bytes(tmp_path: Path, name: str, data: bytes, what: str, next_: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=what) as raised:
        open_checkpoint(str(path))
    assert next_ in raised.value.hint
    assert raised.value.exit_code == 1


def test_a_zip_is_an_archive_unless_torch_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    with pytest.raises(CheckpointError, match="a zip archive"):
        open_checkpoint(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/constants.pkl", b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(str(path))


TENSORS = {
    "a T2I-Adapter": "adapter.body.0.resnets.0.block1.weight",
    "a T2I-Adapter of TencentARC": "body.0.in_conv.weight",
    "a TAESD": "decoder.layers.0.conv.weight",
    "a TAESD of its author": "3.conv.0.weight",
    "the averaged weights of a UNet alone": "model_ema.diffusion_modelinput_blocks00weight",
    "a hypernetwork": "768.0.linear.0.weight",
    "CLIP's picture encoder": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "OpenCLIP's picture encoder": "visual.conv1.weight",
    "a LoRA": "lora_unet_mid_block_attentions_0.lora_down.weight",
    "a ControlNet": "control_model.input_blocks.0.0.weight",
    "a UNet alone": "down_blocks.0.resnets.0.conv1.weight",
}  # fmt: skip


@pytest.mark.parametrize(("what", "name"), TENSORS.items())
def test_a_file_of_tensors_is_named_by_them(tmp_path: Path, what: str, name: str) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=what.partition(" of ")[0].replace("OpenCLIP", "CLIP")):
        open_checkpoint(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ({768: (torch.zeros(1),), "name": "x"}, "a hypernetwork"),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1)}}, "a textual inversion embedding"),
        ({"<cat>": torch.zeros(1)}, "a textual inversion embedding"),
    ],
)
def test_a_pickle_of_other_things_is_named(tmp_path: Path, saved: dict[object, object], what: str) -> None:
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(str(tmp_path / "m.pt"))


def test_a_unet_alone_is_named_though_its_conv_in_is_called_as_an_adapters(tmp_path: Path) -> None:
    save_file(make_model(small_recipe(Family.SD1)).unet, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="a UNet alone"):
        open_checkpoint(str(tmp_path / "m.safetensors"))


def test_a_unet_alone_in_fp8_is_said_to_be_so(tmp_path: Path) -> None:
    save_file({"down_blocks.0.x.weight": torch.zeros(1).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"a UNet alone.* \(in fp8\)"):
        open_checkpoint(str(tmp_path / "m.safetensors"))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in to_original(make_model(small_recipe(Family.SD1))).items()}


@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "scaled"])
def test_weights_of_8_bits_are_said_to_be_quantised(
    tmp_path: Path, weights: dict[str, torch.Tensor], stored: str, container: str
) -> None:
    dtype = getattr(torch, stored, torch.float8_e4m3fn)
    narrow = {name: t.to(dtype) if t.ndim > 1 else t for name, t in weights.items()}
    if stored == "scaled":
        narrow["scaled_fp8"] = torch.zeros(2).to(dtype)
        narrow |= {f"{name}.scale_weight": torch.ones(1) for name in list(narrow) if narrow[name].dtype == dtype}
    path = tmp_path / f"m.{container}"
    if container == "ckpt":
        torch.save({"state_dict": narrow}, path)
    else:
        save_file(narrow, path)
    with pytest.raises(CheckpointError, match="the checkpoint is quantised") as raised:
        open_checkpoint(str(path))
    assert "fp16" in raised.value.hint


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def write_config(folder: Path, **values: object) -> None:
    (folder / "config.json").write_text(json.dumps(values))


FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "nothing": (lambda p: None, "empty", "download"),
    "the hub's cache": (
        lambda p: touch(p, "snapshots/abc/model_index.json", "refs/main", "blobs/1"), "cache", "snapshots/abc"
    ),
    "a cache without a model": (lambda p: touch(p, "snapshots/abc/x", "blobs/1"), "cache", "download"),
    "the hub's whole cache": (lambda p: touch(p, "models--a--b/refs/main"), "the cache of Hugging Face", "a/b"),
    "a tokenizer": (lambda p: touch(p, "tokenizer_config.json", "vocab.json"), "a tokenizer alone", "folder above"),
    "a scheduler": (lambda p: touch(p, "scheduler_config.json"), "a scheduler alone", "folder above"),
    "a VAE": (lambda p: write_config(p, _class_name="AutoencoderKL"), "a VAE alone", "--vae"),
    "a TAESD": (lambda p: write_config(p, _class_name="AutoencoderTiny"), "TAESD", "whole model"),
    "a ControlNet": (lambda p: write_config(p, _class_name="ControlNetModel"), "ControlNet", "whole model"),
    "a T2I-Adapter": (lambda p: write_config(p, _class_name="T2IAdapter"), "T2I-Adapter", "whole model"),
    "CLIP vision": (lambda p: write_config(p, architectures=["CLIPVisionModel"]), "picture encoder", "whole model"),
    "a LoRA": (lambda p: touch(p, "adapter_config.json"), "LoRA", "model itself"),
    "Flax": (lambda p: touch(p, "model_index.json", "unet/diffusion_flax_model.msgpack"), "Flax", "safetensors"),
    "ONNX": (lambda p: touch(p, "model_index.json", "unet/model.onnx"), "exported to ONNX", "checkpoint"),
    "OpenVINO": (lambda p: touch(p, "model_index.json", "unet/openvino_model.xml"), "to OpenVINO", "checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("fill", "what", "next_"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_named_by_what_is_in_it(
    tmp_path: Path, fill: Callable[[Path], object], what: str, next_: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    fill(folder)
    with pytest.raises(CheckpointError, match=what) as raised:
        open_checkpoint(str(folder))
    assert next_ in raised.value.hint


@pytest.mark.parametrize(
    ("url", "next_"),
    [
        ("https://huggingface.co/runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("https://huggingface.co/a/b/tree/main", "a/b"),
        ("https://huggingface.co/a/b/resolve/main/m.safetensors", "download the file"),
        ("huggingface.co/a/b", "instead: a/b"),
        ("git@hf.co:a/b", "instead: a/b"),
        ("https://huggingface.co/a/b.git", "instead: a/b"),
        ("file:///models/x.safetensors", "the path: /models/x.safetensors"),
        ("https://civitai.com/models/1", "download the file"),
    ],
)
def test_an_address_is_no_source(url: str, next_: str) -> None:
    with pytest.raises(CheckpointError, match="address") as raised:
        open_checkpoint(url)
    assert raised.value.hint.endswith(next_) or next_ in raised.value.hint
