"""`sdopt check`: one sentence, and the command that mends it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich_click as click

from sdopt import progress


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def check(folder: Path, as_json: bool) -> None:
    """Check every digest and shape of a bundle, and whether this machine can run it.

    Exit code 1: damaged. 5: whole, but something is missing here.
    """
    from sdopt.build.check import check_bundle, require_whole

    with progress.shown_on_stderr():
        report = check_bundle(folder)
    if as_json and not (report.problems or report.missing):
        print(json.dumps({"folder": str(folder), "ok": True, "sentence": report.sentence}))
    require_whole(report)
    print(report.sentence, file=sys.stderr)
