"""What a path is when it is not a checkpoint: named by its first bytes, a folder by what lies in it.

Files whose tensors can be listed are named by these, in `weights.tensor_kinds`.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from sdopt.errors import CheckpointError

_START_BYTES = 4096
_DOWNLOAD_AGAIN = "download it again, to the end"
_UNPACK = "unpack it, and give the checkpoint that is in it"
_PARTIAL_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2", ".opdownload")
# First bytes -> what the file is, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file: its weights are quantised", "take the model as fp16 safetensors"),
    (b"\x89PNG", "a picture", "give the model that drew it"),
    (b"\xff\xd8\xff", "a picture", "give the model that drew it"),
    (b"RIFF", "a picture or a sound", "give a checkpoint"),
    (b"\x89HDF", "an HDF5 file, as TensorFlow and Keras write it", "take the model as safetensors"),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"%PDF", "a PDF document", "give a checkpoint"),
)
_SUFFIXES = {
    ".msgpack": ("a file of Flax weights", "take the model as safetensors, which torch reads"),
    ".onnx": ("an ONNX graph: it is already exported", "give the checkpoint that it was exported from"),
    ".tflite": ("a TensorFlow Lite model", "take the model as safetensors"),
    ".mlmodel": ("a Core ML model", "take the model as safetensors"),
    ".plan": ("a TensorRT plan: it is already built", "give the checkpoint that it was built from"),
    ".engine": ("a TensorRT plan: it is already built", "give the checkpoint that it was built from"),
    ".trt": ("a TensorRT plan: it is already built", "give the checkpoint that it was built from"),
}
_CLASSES = {
    "AutoencoderTiny": "a TAESD, which only previews: it is not a whole VAE",
    "AutoencoderKL": "a VAE alone",
    "UNet2DConditionModel": "a UNet alone",
    "ControlNetModel": "a ControlNet",
    "ControlNetUnionModel": "a ControlNet",
    "T2IAdapter": "a T2I-Adapter",
    "MultiAdapter": "a T2I-Adapter",
    "MotionAdapter": "a motion module",
}
_ARCHITECTURES = {
    "CLIPVisionModel": "CLIP's picture encoder",
    "CLIPVisionModelWithProjection": "CLIP's picture encoder",
    "CLIPTextModel": "a text encoder alone",
    "CLIPTextModelWithProjection": "a text encoder alone",
}
_URL = re.compile(r"^((https?|ftp|s3|hf|file)://|(www\.)?(huggingface\.co|hf\.co)/|git@)", re.IGNORECASE)
_HUB_PAGE = re.compile(
    r"^(?:https?://|git@)?(?:www\.)?(?:huggingface\.co|hf\.co)[/:](?P<id>[^/?#]+/[^/?#]+?)(?:\.git)?(?=[/?#]|$)"
    r"(?P<file>/(?:blob|resolve)/[^?#]+)?(?P<rest>.*)$"
)


def refuse_url(source: str) -> None:
    """Raise `CheckpointError` for an address in a browser, which is not a source."""
    if not _URL.match(source) or Path(source).exists():
        return
    if source.lower().startswith("file://"):
        raise CheckpointError(f"{source} is an address, and sdopt takes paths", hint=f"give the path: {source[7:]}")
    page = _HUB_PAGE.match(source)
    name = page["id"] if page and not page["file"] else ""
    hint = f"give its id instead: {name}" if name else "download the file, and give its path"
    raise CheckpointError(f"{source} is the address of a page or a file, and sdopt downloads only by id", hint=hint)


def refuse_file(path: Path) -> None:
    """Raise `CheckpointError` where the first bytes say that a file is not a checkpoint, and what it is.

    A file that they do not name is left to the readers of safetensors and of pickles.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix.lower() in _PARTIAL_SUFFIXES or path.with_name(path.name + ".aria2").exists():
        raise CheckpointError(f"{path} is a download that has not finished", hint=_DOWNLOAD_AGAIN)
    if not size_bytes:
        raise CheckpointError(f"{path} is empty", hint=_DOWNLOAD_AGAIN)
    named = _name_text(path, start) if _is_text(start) else _name_binary(path, start)
    if named:
        raise CheckpointError(f"{path} is {named[0]}", hint=named[1])


def _name_binary(path: Path, start: bytes) -> tuple[str, str] | None:
    for magic, what, hint in _MAGIC:
        if start.startswith(magic):
            return what, hint
    if not start.strip(b"\0"):
        return "not written yet: it begins with zeros, as a download that was cut off", _DOWNLOAD_AGAIN
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if start.startswith(b"PK\x03\x04"):
        return _name_zip(path)
    return _SUFFIXES.get(path.suffix.lower())


def _name_zip(path: Path) -> tuple[str, str] | None:
    """torch saves a zip with data.pkl in it; TorchScript one with code as well."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "a damaged archive or a download that was cut off", _DOWNLOAD_AGAIN
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, and not weights", "take the model as safetensors"
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "a zip archive", _UNPACK
    return None


def _is_text(start: bytes) -> bool:
    """UTF-8 without control characters; one that the read cut in two at its end does not count."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\r\n\t\ufeff" for character in text)


def _name_text(path: Path, start: bytes) -> tuple[str, str]:
    text = start.decode("utf-8", errors="ignore").lstrip("\ufeff \r\n\t")
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, and not the file itself", "run git lfs pull in its folder, or download the file"
    lowered = text.lower()
    if lowered.startswith("<?xml") and "<net" in lowered:
        return "an OpenVINO model: it is already exported", "give the checkpoint that it was exported from"
    if lowered.startswith(("<!doctype", "<html", "<head", "<body", "<?xml", "<svg")):
        return (
            "a web page, and not the file itself",
            "download it again: the site may want you to log in or to accept a licence",
        )
    if text.startswith(("{", "[")):
        if path.name.endswith(".index.json") or path.name == "model_index.json":
            return "the index of a model, and not the model", f"give the folder that it lies in: {path.parent}"
        if path.name == "bundle.json":
            return "the manifest of a bundle, and not a model", f"give the folder that it lies in: {path.parent}"
        if '"nodes"' in text or '"class_type"' in text:
            return "a workflow of ComfyUI", "give the checkpoint that it loads"
        return (
            "a JSON text, and not the file itself",
            "open it: a site that refuses a download says why in such a text; then download the file again",
        )
    if path.suffix.lower() in (".yaml", ".yml"):
        return "a config, and not the model", "give the .safetensors or .ckpt file beside it"
    return "a text, and not a model", "give a diffusers folder, a .safetensors or .ckpt file, or a Hugging Face id"


def name_folder(folder: Path) -> tuple[str, str] | None:
    """What a folder without a model_index.json is, and what to do; None where nothing is recognised."""
    if (folder / "snapshots").is_dir() and ((folder / "blobs").is_dir() or (folder / "refs").is_dir()):
        found = sorted(path.parent for path in (folder / "snapshots").glob("*/model_index.json"))
        hint = f"give its snapshot: {found[-1]}" if found else "download the model: it has no whole snapshot"
        return "the cache of a Hugging Face model, and not the model", hint
    if models := sorted(path.name for path in folder.glob("models--*") if path.is_dir()):
        ids = ", ".join(name.removeprefix("models--").replace("--", "/") for name in models[:3])
        return "the cache of Hugging Face, and not a model", f"give the id of a model in it: {ids}"
    for name, what in (("scheduler_config.json", "a scheduler alone"), ("tokenizer_config.json", "a tokenizer alone")):
        if (folder / name).is_file() and not (folder / "config.json").is_file():
            return what, f"give the folder above, {folder.absolute().parent}"
    if (folder / "adapter_config.json").is_file() or list(folder.glob("*lora_weights*")):
        return "a LoRA adapter", "it changes a model and is not one: give the model itself as SOURCE"
    if (config := _read_small_json(folder / "config.json")) is not None:
        architectures = config.get("architectures")
        names = [str(config.get("_class_name", "")), *(architectures if isinstance(architectures, list) else [])]
        kind = next((kinds[name] for kinds in (_CLASSES, _ARCHITECTURES) for name in names if name in kinds), None)
        if kind is not None:
            return kind, _advise_component(kind, folder)
    if not any(folder.iterdir()):
        return "empty", "download the model again"
    return name_exported(folder)


def _advise_component(kind: str, folder: Path) -> str:
    above = folder.absolute().parent
    if (above / "model_index.json").is_file():
        return f"give the folder above, {above}"
    if kind == _CLASSES["AutoencoderKL"]:
        return "give the model as SOURCE, and this folder with --vae"
    return "give the whole model as SOURCE"


def name_exported(folder: Path) -> tuple[str, str] | None:
    """A model whose networks are there, but in a format that is not torch's; None where its UNet has torch weights."""
    unet = folder / "unet"
    if any(unet.glob("*.safetensors")) or any(unet.glob("*.bin")):
        return None
    if any(unet.glob("openvino_model.xml")):
        return "a model that is already exported to OpenVINO", "give the checkpoint that it was exported from"
    if any(unet.glob("*.onnx")):
        return "a model that is already exported to ONNX", "give the checkpoint that it was exported from"
    if any(unet.glob("*.msgpack")):
        return "a model with Flax weights only", "take one with safetensors, which torch reads"
    return None


def _read_small_json(path: Path) -> dict[str, object] | None:
    try:
        if path.stat().st_size > 1 << 20:
            return None
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None
