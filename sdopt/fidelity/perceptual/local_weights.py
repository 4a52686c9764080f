"""`--weights NAME=PATH`: which perceptual figures are measured, and with what. Nothing is opened before it is named.

LPIPS takes a file, or several that complete each other: the backbone as torchvision publishes it, and the `lin` layers
as the lpips package does. A `.pth` goes through the sandbox of checkpoints first. CLIP takes a folder of transformers
with weights in safetensors; it gives the CLIP score, and the features of FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt.disk.files import hash_file
from sdopt.errors import SdoptError, UsageError
from sdopt.model.suggest import suggest
from sdopt.weights.safetensors_header import TensorRef, read_header

NOT_MEASURED = "not measured (no weights)"
_NAMES = ("lpips", "clip")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class PerceptualWeights:
    """Files of LPIPS and the folder of a CLIP model; what is empty is not measured."""

    lpips: tuple[Path, ...] = ()
    clip: Path | None = None


def parse_weights(values: Sequence[str]) -> PerceptualWeights:
    """`('lpips=alexnet.pth', 'lpips=alex.pth', 'clip=FOLDER')`. Raises `UsageError` that names what is wrong."""
    lpips: list[Path] = []
    clip: list[Path] = []
    for value in values:
        name, separator, path = value.partition("=")
        if name not in _NAMES:
            raise UsageError(
                f"there are no weights named {name!r}",
                hint=suggest(name, _NAMES, more=", as in lpips=FILE, clip=FOLDER"),
            )
        if not separator or not path:
            raise UsageError(f"--weights {value!r} has no path", hint=f"write it as --weights {name}=PATH")
        (lpips if name == "lpips" else clip).append(_require_place(name, Path(path).expanduser()))
    if len(clip) > 1:
        raise UsageError("there are two folders for clip", hint="name one")
    return PerceptualWeights(tuple(lpips), clip[0] if clip else None)


def _require_place(name: str, path: Path) -> Path:
    if name == "lpips" and not path.is_file():
        raise UsageError(f"--weights lpips={path}: there is no such file", hint="name a .safetensors or .pth file")
    if name == "clip":
        if not (path / "config.json").is_file():
            raise UsageError(
                f"--weights clip={path} is not a folder of a CLIP model: it has no config.json",
                hint="name a folder as huggingface-cli download openai/clip-vit-base-patch32 --local-dir makes it",
            )
        if not list_clip_files(path):
            raise UsageError(
                f"--weights clip={path} has no weights in safetensors",
                hint="pickles are not read: download the model's model.safetensors into it",
            )
    return path


def list_clip_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_tensors(files: Sequence[Path]) -> dict[str, TensorRef]:
    """The tensors of all files together. A pickle is turned into safetensors in the sandbox of checkpoints.

    Raises `UsageError` where two files have a tensor of one name, and what reading a file raises.
    """
    tensors: dict[str, TensorRef] = {}
    for file in files:
        found = read_header(_convert(file)).tensors
        if twice := tensors.keys() & found.keys():
            raise UsageError(f"{file} has the tensor {min(twice)!r} of another file once more", hint="name one of them")
        tensors |= found
    return tensors


def _convert(file: Path) -> Path:
    if file.suffix.lower() not in _PICKLES:
        return file
    from sdopt.checkpoint.pickle_sandbox import convert_pickle

    return convert_pickle(file)


def describe_weights(files: Sequence[Path]) -> str:
    """'alexnet.pth, SHA-256 0a1b…; alex.pth, SHA-256 …', of the files as they were named."""
    return "; ".join(f"{file.name}, SHA-256 {hash_file(file)}" for file in files)


def describe_failure(error: SdoptError) -> str:
    """In the place of a figure, where its weights turned out to be no use: the run itself goes on."""
    return f"not measured: {error.message}"
