"""How large a VAE's values get by the side of the picture, and what the choice of its precision costs.

    python benchmarks/vae_overflow.py MODEL --sides 128,256,512

`sdopt convert` looks at pictures of `SIDE_PX`. The growth from there to the size that is built for must be well within
`HEADROOM`.
"""

from __future__ import annotations

import dataclasses
import time

import click

from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert.plan import resolve_build
from sdopt.convert.vae_precision import LARGEST_FP16, SIDE_PX, describe_job, measure_halves
from sdopt.model.recipe import BuildRecipe


@click.command()
@click.argument("source")
@click.option("--sides", default=f"64,{SIDE_PX},256,512", show_default=True, help="Pixels, with commas.")
def main(source: str, sides: str) -> None:
    plan = resolve_build(open_checkpoint(source), BuildRecipe(source=source))
    for side_px in map(int, sides.split(",")):
        start = time.monotonic()
        job = dataclasses.replace(describe_job(plan), height_px=side_px, width_px=side_px)
        measured = measure_halves(job)
        seconds = time.monotonic() - start
        for name, half in measured.items():
            psnr = "" if half.bf16_psnr_db is None else f", bf16 {half.bf16_psnr_db:.1f} dB"
            print(
                f"{side_px} px, {name}: {half.largest:.4g} of {LARGEST_FP16:.0f} ({half.layer}){psnr}; {seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
