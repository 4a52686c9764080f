"""`sdopt export`: a bundle for other tools, one subcommand for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rich_click as click

from sdopt import progress
from sdopt.cli.text import neutralise


def _open_links(context: click.Context, parameter: click.Parameter, folder: Path) -> Path:
    del context, parameter
    from sdopt.bundle.linked import open_links

    return open_links(folder)


_FOLDER = click.argument("folder", type=click.Path(path_type=Path), callback=_open_links)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON on stdout.")


@click.group()
def export() -> None:
    """Write a bundle as other tools want it."""


@export.command()
@_FOLDER
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The model repository.")
@click.option("--backend", metavar="NAME", help="tensorrt, onnxruntime, python.  [default: plans where there are any]")
@click.option("--name", metavar="NAME", help="The model that draws.  [default: the bundle's name]")
@click.option("--scheduler", metavar="NAME", help="euler, ddim.  [default: the checkpoint's own, else euler]")
@_JSON
def triton(
    folder: Path, output: Path, backend: str | None, name: str | None, scheduler: str | None, as_json: bool
) -> None:
    """Write a Triton model repository: one model for each network, and one that draws.

    It takes `prompt` and, where they are given, `negative_prompt`, `seed`, `steps`, `guidance_scale` and `latents`
    (noise of variance 1); it gives `generated_image`. A seed is numpy's: `sdopt generate` draws another picture of it.
    """
    from sdopt.export.triton.repository import export_triton

    with progress.shown_on_stderr():
        done = export_triton(folder, output, backend=backend, name=name, scheduler=scheduler)
    values = {"backend": done.backend, "model": done.model, "networks": done.networks, "needs": done.needs}
    lines = [f"{output} is ready: the model {done.model} draws. It needs:", *(f"  {need}" for need in done.needs)]
    _tell(as_json, output, values, [*lines, f"  tritonserver --model-repository={output}"])


@export.command()
@_FOLDER
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="ComfyUI's folder; with --graph, any."
)
@click.option("--name", metavar="NAME", help="Beginning of the engine's name.  [default: the bundle's name]")
@click.option("--graph", is_flag=True, help="Write the ONNX graph and its weights, and build no engine.")
@_JSON
def comfyui(folder: Path, output: Path, name: str | None, graph: bool, as_json: bool) -> None:
    """Build the engine that ComfyUI's TensorRT loader takes, into ComfyUI's models/tensorrt.

    It takes general TensorRT and the GPU that ComfyUI runs on. With --graph the engine is left to trtexec there.
    """
    from sdopt.export.comfyui.engine_file import export_engine, export_graph

    with progress.shown_on_stderr():
        done = (export_graph if graph else export_engine)(folder, output, name=name)
    values = {"path": str(done.path), "engine": done.engine, "model_type": done.model_type}
    lines = [f"{done.path} is ready. In ComfyUI's TensorRT loader choose {done.engine} and {done.model_type}"]
    if graph:
        built = f"ComfyUI/models/tensorrt/{done.engine}"
        lines += ["First, on ComfyUI's machine, with the version of TensorRT that ComfyUI has:",
                  f"  trtexec --stronglyTyped --onnx={done.path / 'model.onnx'} --saveEngine='{built}'"]  # fmt: skip
    _tell(as_json, output, values, lines)


@export.command()
@_FOLDER
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@_JSON
def optimum(folder: Path, output: Path, as_json: bool) -> None:
    """Write the folder that the ONNX Runtime pipelines of optimum load."""
    from sdopt.export.optimum import export_optimum

    with progress.shown_on_stderr():
        done = export_optimum(folder, output)
    lines = [f"{output} is ready: optimum.onnxruntime.ORTDiffusionPipeline.from_pretrained({str(output)!r})"]
    _tell(as_json, output, {"pipeline": done.pipeline, "files": done.files}, lines)


def _tell(as_json: bool, output: Path, values: dict[str, Any], lines: list[str]) -> None:
    if as_json:
        print(json.dumps({"schema_version": 1, "folder": str(output), **values}))
    print(neutralise("\n".join(lines)), file=sys.stderr)
