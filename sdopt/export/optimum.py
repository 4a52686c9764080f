"""`sdopt export optimum`: the folder that optimum's ONNX Runtime pipelines load, without what is sdopt's own.

A bundle's layout already is optimum's; this leaves out the manifest and the engines of other runtimes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdopt import progress
from sdopt.bundle.manifest import BundleManifest
from sdopt.disk.files import write_file
from sdopt.export.published_folder import copy_file, open_bundle, staged, sum_bytes

_CARD = "README.md"


@dataclass(frozen=True)
class OptimumExport:
    """`pipeline` is diffusers' class name; optimum's own begins with ORT."""

    folder: Path
    pipeline: str
    files: tuple[str, ...]


def export_optimum(folder: Path, output: Path) -> OptimumExport:
    """Write `output`, whole or not at all.

    Raises `ArtifactError` for a damaged bundle, or where `output` holds what sdopt did not export.
    """
    manifest = open_bundle(folder)
    left_out = {_CARD, *_list_plans(manifest)}
    files = [name for name in manifest.files if name not in left_out]
    with staged(output, "optimum", manifest, sum_bytes(manifest, files)) as growing:
        for count, name in enumerate(files):
            progress.update("copying", count / len(files))
            copy_file(folder, name, growing / name)
        write_file(growing / _CARD, _make_card(manifest).encode())
    index = json.loads((folder / "model_index.json").read_bytes())
    return OptimumExport(output, str(index["_class_name"]), tuple(files))


def _list_plans(manifest: BundleManifest) -> set[str]:
    return {plan.file for record in manifest.components.values() for plan in record.every_plan}


def _make_card(manifest: BundleManifest) -> str:
    licence = manifest.source.licence
    head = ["---", f"license: {licence or 'other'}", "pipeline_tag: text-to-image", "---", "", f"# {manifest.name}", ""]
    return "\n".join(
        [*head, "```python", "from optimum.onnxruntime import ORTDiffusionPipeline", "",
         'image = ORTDiffusionPipeline.from_pretrained("this folder")("a prompt").images[0]', "```", ""]
    )  # fmt: skip
