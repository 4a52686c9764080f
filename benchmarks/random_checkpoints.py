"""Full-size Stable Diffusion networks with seeded random weights: the right cost and memory, no download.

python benchmarks/random_checkpoints.py sd15 out/random/sd15
python benchmarks/random_checkpoints.py sdxl out/random/sdxl
"""

from __future__ import annotations

from pathlib import Path

import click

from sdopt.bench.case.random_checkpoint import make_checkpoint


@click.command()
@click.argument("family", type=click.Choice(["sd15", "sdxl"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(family: str, folder: Path, seed: int) -> None:
    make_checkpoint(family, folder, seed)
    print(folder)


if __name__ == "__main__":
    main()
