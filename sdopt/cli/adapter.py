"""`sdopt adapter`: a LoRA file for other programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich_click as click

from sdopt import progress
from sdopt.cli.text import neutralise


@click.group()
def adapter() -> None:
    """Write a LoRA as other tools want it."""


@adapter.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--for", "bundle", type=click.Path(path_type=Path), required=True, metavar="BUNDLE",
              help="The bundle whose graphs are run, built with --lora-slots.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--weight", default=1.0, show_default=True, help="How strongly it acts; it cannot be changed later.")
@click.option("--lora-error", type=click.FloatRange(0.0, 1.0),
              help="The most that a layer may differ that is brought to the slots' rank.  [default: 0.02]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON on stdout.")
def export_adapter(
    file: Path, bundle: Path, output: Path, weight: float, lora_error: float | None, as_json: bool
) -> None:
    """Write FILE as .onnx_adapter files, for programs that run a bundle's graphs with plain ONNX Runtime.

    One for each network that it changes, beside a graph that takes it. The weights stay in the bundle.
    """
    from sdopt.adapters.resolve import ERROR_LIMIT
    from sdopt.bundle.linked import open_links
    from sdopt.export.onnx_adapter import export_onnx_adapter

    limit = ERROR_LIMIT if lora_error is None else lora_error
    with progress.shown_on_stderr():
        done = export_onnx_adapter(file, open_links(bundle), output, weight=weight, error_limit=limit)
    if as_json:
        networks = {
            name: {"adapter": done.adapters[name], "graph": done.graphs[name], "weights": str(done.weights[name])}
            for name in done.adapters
        }
        print(json.dumps({"schema_version": 1, "folder": str(output), "networks": networks}))
    lines = [f"{output} is ready. After `import onnxruntime, pathlib`:"]
    for name in done.adapters:
        lines += [
            "  options = onnxruntime.SessionOptions()",
            "  options.log_severity_level = 3  # it warns of each input that has a default",
            "  options.add_session_config_entry(",
            f'      "session.model_external_initializers_file_folder_path", {str(done.weights[name])!r})',
            f"  graph = pathlib.Path({str(output / done.graphs[name])!r}).read_bytes()",
            "  session = onnxruntime.InferenceSession(graph, options)",
            f"  adapter = onnxruntime.LoraAdapter(); adapter.Load({str(output / done.adapters[name])!r})",
            "  run = onnxruntime.RunOptions(); run.add_active_adapter(adapter)",
            "  session.run(None, inputs, run)",
        ]
    print(neutralise("\n".join(lines)), file=sys.stderr)
