"""`sdopt inspect`: what is this file or folder?"""

from __future__ import annotations

import json

import rich_click as click


@click.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known as JSON on stdout.")
@click.option("--for", "bundle", metavar="BUNDLE", help="Say whether this bundle takes SOURCE, which is a LoRA.")
def inspect(source: str, as_json: bool, bundle: str | None) -> None:
    """Say what SOURCE is, and what is in it: a bundle, an ONNX graph, a TensorRT plan, a LoRA, a textual inversion or a
    checkpoint.
    """
    from sdopt.library.identify import inspect_source

    table = inspect_source(source, bundle=bundle)
    if as_json:
        print(json.dumps(table))
        return
    from rich.console import Console

    from sdopt.cli.inspect_page import print_page

    print_page(Console(stderr=True), source, table)
