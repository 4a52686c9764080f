"""Where the tolerances of `sdopt bench --layers` come from: how near sound engines come to them, layer by layer.

    sdopt convert sdopt/assets/tiny-shapes -o out/tiny-shapes
    python benchmarks/layer_tolerances.py out/tiny-shapes

Prints the largest error and the largest share of its tolerance that a layer of each component takes. The tolerances are
right when sound engines stay under 100 % and no tolerance lets a fault of 5 % pass.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from sdopt.bundle.manifest import read_manifest
from sdopt.fidelity.layer_errors import compare_layers


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        manifest = read_manifest(folder)
        for name, record in manifest.components.items():
            with tempfile.TemporaryDirectory(prefix="sdopt-layers-") as work:
                compared = compare_layers(folder, manifest, name, Path(work))
            worst = max(compared.layers, key=lambda layer: layer.relative_error / layer.tolerance)
            click.echo(
                f"{folder.name} {name} {record.precision} on {compared.runtime or record.backend.kind}: "
                f"{len(compared.layers)} layers, error {max(layer.relative_error for layer in compared.layers):.1e} or "
                f"less, tolerance {max(layer.tolerance for layer in compared.layers):.1e} or less, "
                f"{worst.relative_error / worst.tolerance:.0%} of it at {worst.layer}"
            )


if __name__ == "__main__":
    main()
