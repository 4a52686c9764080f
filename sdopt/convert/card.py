"""The small files of a bundle: configs, scheduler, tokenizers, `model_index.json` and the model card.

The layout is diffusers', with one folder for each half of the VAE, as optimum's ONNX pipelines expect it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdopt._version import __version__
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import Verdict
from sdopt.checkpoint.checkpoint import Checkpoint
from sdopt.convert.plan import BuildPlan
from sdopt.disk.files import disk_errors, write_file
from sdopt.errors import ArtifactError
from sdopt.model.component import ComponentName, has_projection
from sdopt.model.file_names import GRAPH_NAME
from sdopt.model.shape import describe_profiles
from sdopt.model.task import PIPELINE_CLASSES, Task

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def write_small_files(plan: BuildPlan, graphs: dict[ComponentName, Path], folder: Path) -> None:
    """Everything but weights, manifest and card; each file whole or not at all."""
    checkpoint = plan.checkpoint
    with disk_errors(folder):
        for name, graph in graphs.items():
            (folder / name).mkdir(exist_ok=True)
            write_file(folder / name / GRAPH_NAME, graph.read_bytes())
            write_file(folder / name / "config.json", _to_json(dict(plan.components[name].config)))
        (folder / "scheduler").mkdir(exist_ok=True)
        write_file(folder / "scheduler" / "scheduler_config.json", _to_json(dict(checkpoint.scheduler)))
        for kind, source in checkpoint.tokenizers.items():
            _copy_tokenizer(source, folder / kind)
        write_file(folder / "model_index.json", _to_json(_model_index(checkpoint)))


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ArtifactError(f"the tokenizer folder {source} is empty")
    for name in found:
        write_file(target / name, (source / name).read_bytes())


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    components = checkpoint.components
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASSES[checkpoint.family][checkpoint.tasks[0]]}
    for name in (ComponentName.TEXT_ENCODER, ComponentName.TEXT_ENCODER_2):
        if name in components:
            projected = has_projection(components[name].config)
            index[name] = ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
        elif checkpoint.family.is_xl:
            index[name] = [None, None]
    for kind in checkpoint.tokenizers:
        index[kind] = ["transformers", "CLIPTokenizer"]
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index["vae"] = ["diffusers", "AutoencoderKL"]
    index["scheduler"] = ["diffusers", checkpoint.scheduler.get("_class_name", "PNDMScheduler")]
    if not checkpoint.family.is_xl:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {**index, **checkpoint.pipeline_options}


def make_card(manifest: BundleManifest) -> str:
    """The bundle's README: what, from what, for what, how faithful, under which licence."""
    licence = manifest.source.licence
    # A card is published with its bundle: it names the file, not the folders of whoever built it.
    local = manifest.source.kind != "huggingface"
    origin = Path(manifest.source.location).name if local else manifest.source.location
    lines = [
        "---",
        f"license: {licence or 'other'}",
        "library_name: sdopt",
        "pipeline_tag: text-to-image",
        "---",
        "",
        f"# {manifest.name}",
        "",
        f"A bundle of engines that sdopt {__version__} made from `{origin}` "
        f"({manifest.family}, {manifest.prediction}{', inpainting' if manifest.own_task is Task.INPAINT else ''}).",
        "",
        f"- size: {describe_profiles(manifest.profiles)}",
        *(
            f"- {name}: {record.precision} on {record.backend.kind}, {record.audit.attention_nodes} attention nodes"
            + (f"; {record.precision_reason}" if record.precision_reason else "")
            + (f"; {record.quantization.describe()}" if record.quantization else "")
            for name, record in manifest.components.items()
        ),
        f"- fidelity against torch fp32: **{manifest.fidelity.verdict}**. {manifest.fidelity.reason}",
        f"- licence: {licence or 'not stated by the source: ask whoever published it'}",
        "",
    ]
    if manifest.fidelity.verdict is not Verdict.NOT_VERIFIED:
        lines += ["| prompt | PSNR (dB) | SSIM | noise floor (dB) |", "|---|---|---|---|"]
        for image in manifest.fidelity.images:
            prompt = image.prompt.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {prompt} | {_db(image.psnr_db)} | {image.ssim:.4f} | {_db(image.noise_floor_psnr_db)} |")
        lines.append("")
    lines += ["```python", "import sdopt", "", 'image = sdopt.load("this folder")("a prompt").images[0]', "```", ""]
    return "\n".join(lines)


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
