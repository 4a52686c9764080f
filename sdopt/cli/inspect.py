"""`sdopt inspect`: what is this file or folder?"""

from __future__ import annotations

import json
from typing import Any

import rich_click as click

from sdopt.cli.text import neutralise


@click.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known as JSON on stdout.")
def inspect(source: str, as_json: bool) -> None:
    """Say what SOURCE is: a bundle, an ONNX graph or a checkpoint, and what is in it."""
    from sdopt.build.inspect import inspect_source

    table = inspect_source(source)
    if as_json:
        print(json.dumps(table))
        return
    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"{neutralise(source)} is a {table['kind']}", style="bold", highlight=False, markup=False)
    for key, value in (_summarise_bundle(table) if table["kind"] == "bundle" else table).items():
        console.print(f"  {key}: ", end="", style="cyan", markup=False)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        console.print(neutralise(text), markup=False)


def _summarise_bundle(table: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what only a program wants to read."""
    profile = table["profile"]
    summary = {key: table[key] for key in ("family", "prediction", "inpainting", "created_utc")}
    summary["source"] = table["source"]["location"]
    summary["licence"] = table["source"]["licence"] or "not stated"
    summary["size"] = f"{profile['width_px']['opt']}x{profile['height_px']['opt']} px, batch {profile['batch']['opt']}"
    for name, part in table["components"].items():
        audit, parity = part["audit"], part["parity"]
        error = f"{max(o['relative_l2'] for o in parity['outputs']):.1e}" if parity else "not checked"
        summary[name] = (
            f"{part['precision']} on {part['backend']['kind']}; opset {audit['opset']}, {audit['nodes']} nodes, "
            f"attention {audit['attention_nodes']} of {audit['attention_layers']} fused; parity error {error}"
        )
    summary["fidelity"] = f"{table['fidelity']['verdict']}. {table['fidelity']['reason']}"
    summary["bytes"] = f"{sum(record['size_bytes'] for record in table['files'].values()):,}"
    return summary
