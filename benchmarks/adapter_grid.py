"""Pictures of the shipped LoRAs on one engine, for the README: each column is one `sdopt generate` command.

    sdopt convert sdopt/assets/tiny-shapes --lora-slots all:16 -o out/slotted
    python benchmarks/adapter_grid.py out/slotted benchmarks/tiny-shapes/adapters.png

Prints the commands. Nothing is rebuilt between the columns.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

_ADAPTERS = "sdopt/assets/tiny-adapters"
_PROMPTS = (
    "a large red star on a yellow background, left",
    "a large green square on a black background, right",
    "a large purple triangle on a white background, bottom",
)
_FEW = ("--steps", "2", "--scale", "1")
_EULER = ("--steps", "20", "--scale", "4")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "no LoRA": _EULER,
    "outlines:0.5": (*_EULER, "--lora", f"{_ADAPTERS}/outlines.safetensors:0.5"),
    "outlines:1": (*_EULER, "--lora", f"{_ADAPTERS}/outlines.safetensors:1"),
    "palette:1": (*_EULER, "--lora", f"{_ADAPTERS}/palette.safetensors:1"),
    "both": (
        *_EULER, "--lora", f"{_ADAPTERS}/outlines.safetensors:1", "--lora", f"{_ADAPTERS}/palette.safetensors:1",
    ),
    "2 steps, no LoRA": _FEW,
    "2 steps, few-steps": (*_FEW, "--lora", f"{_ADAPTERS}/few-steps.safetensors:1"),
}  # fmt: skip
_SIDE_PX, _GAP_PX, _LABEL_PX = 128, 4, 22


def draw_column(bundle: Path, seed: int, options: tuple[str, ...]) -> list[Image.Image]:
    """Draw every prompt with one command, which is printed."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["sdopt", "generate", str(bundle), *_PROMPTS, "--seed", str(seed), *options]
        click.echo(shlex.join(words))
        done = subprocess.run([*words, "-o", folder, "--json"], check=True, capture_output=True, text=True)
        paths = [picture["path"] for picture in json.loads(done.stdout)["pictures"]]
        return [Image.open(path).convert("RGB") for path in paths]


def paste_columns(columns: dict[str, list[Image.Image]]) -> Image.Image:
    cell = _SIDE_PX + _GAP_PX
    sheet = Image.new("RGB", (len(columns) * cell + _GAP_PX, len(_PROMPTS) * cell + _GAP_PX + _LABEL_PX), "white")
    write = ImageDraw.Draw(sheet)
    for column, (label, pictures) in enumerate(columns.items()):
        x = _GAP_PX + column * cell
        write.text((x + _SIDE_PX / 2, _LABEL_PX / 2), label, "black", ImageFont.load_default(13), anchor="mm")
        for row, picture in enumerate(pictures):
            tile = picture.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, _LABEL_PX + _GAP_PX + row * cell))
    return sheet


@click.command(help=(__doc__ or "").split("\n", 1)[0])
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", default=7, show_default=True)
def main(bundle: Path, out: Path, seed: int) -> None:
    columns = {label: draw_column(bundle, seed, options) for label, options in _COLUMNS.items()}
    paste_columns(columns).save(out, optimize=True)


if __name__ == "__main__":
    main()
