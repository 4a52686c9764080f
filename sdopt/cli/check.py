"""`sdopt check`: one sentence, and the command that mends it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich_click as click

from sdopt import progress
from sdopt.cli.text import neutralise


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--trust-engine",
    "trust_engines",
    multiple=True,
    metavar="SHA256",
    help="Trust TensorRT plans not built here, from now on: the SHA-256 of a plan, or of bundle.json for all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def check(folder: Path, trust_engines: tuple[str, ...], as_json: bool) -> None:
    """Check every digest and shape of a bundle, and whether this machine may and can run it.

    No runtime library sees a byte of it. Exit code 1: damaged. 4: whole, but its TensorRT plans were not built here,
    and --trust-engine does not name them. 5: whole, but something is missing here.
    """
    from sdopt.preflight.check import check_bundle, require_whole

    with progress.shown_on_stderr():
        report = check_bundle(folder, trust_engines=trust_engines)
    require_whole(report)
    if as_json:
        table = {"folder": str(folder), "ok": True, "sentence": report.sentence, "notes": report.notes}
        print(json.dumps(table | {"plans": dict(report.plans)}))
    for line in (report.sentence, *(f"note: {note}" for note in report.notes)):
        print(neutralise(line), file=sys.stderr)
