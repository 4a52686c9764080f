"""`sdopt generate`: pictures from a bundle, each with the recipe that draws it again."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from sdopt import progress
from sdopt.cli.text import TRUST_ENGINE_HELP
from sdopt.errors import ShapeError, UsageError
from sdopt.model.lora import parse_lora
from sdopt.model.request import DrawRequest, parse_request
from sdopt.model.samplers import NAMES_IN_WORDS
from sdopt.model.shape import parse_size
from sdopt.tasks.draw_files import draw_files
from sdopt.tasks.words import choose_words

if TYPE_CHECKING:
    from sdopt.pictures.png import PictureRecipe

_FLAGS = {
    "prompt": "the prompt",
    "negative_prompt": "--negative",
    "steps": "--steps",
    "guidance_scale": "--scale",
    "seed": "--seed",
    "width_px": "the width of --size",
    "height_px": "the height of --size",
    "scheduler": "--scheduler",
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="PROMPT…", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("pictures"),
    show_default=True,
    help="Folder to write to; for one picture, also the PNG file.",
)
@click.option("--negative", metavar="TEXT", help="What the pictures should not show.")
@click.option("--steps", type=int, help="Steps of the scheduler.  [default: 20, or what a few-step model asks for]")
@click.option("--scale", type=float, help="Guidance scale (CFG). 1 or less turns guidance off.  [default: 7.5]")
@click.option("--seed", type=int, help="Seed of the first picture, one more for each further one.  [default: random]")
@click.option("--size", metavar="WxH", help="One that the bundle was built for.  [default: its first]")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:WEIGHT[:TEXT]]",
    help="A LoRA that acts on every picture; a second weight is that of the text encoders.",
)  # fmt: skip
@click.option(
    "--lora-folder", "lora_folders", multiple=True, type=click.Path(path_type=Path), metavar="FOLDER",
    help="Where the LoRAs are that prompts name, as in <lora:ink:0.8>.",
)  # fmt: skip
@click.option(
    "--embedding", "embeddings", multiple=True, type=click.Path(path_type=Path), metavar="FILE|FOLDER",
    help="Textual inversion: the prompts may have its word, which is the file's name; of a folder, those they have.",
)  # fmt: skip
@click.option("--scheduler", metavar="NAME", help=f"One of {NAMES_IN_WORDS}.  [default: the checkpoint's own]")
@click.option(
    "--from-image",
    type=click.Path(path_type=Path),
    help="Draw a PNG file again; options and prompts given replace its own.",
)
@click.option("--trust-engine", "trust_engines", multiple=True, metavar="SHA256", help=TRUST_ENGINE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print what was drawn as JSON.")
def generate(
    folder: Path,
    prompts: tuple[str, ...],
    output: Path,
    negative: str | None,
    steps: int | None,
    scale: float | None,
    seed: int | None,
    size: str | None,
    loras: tuple[str, ...],
    lora_folders: tuple[Path, ...],
    embeddings: tuple[Path, ...],
    scheduler: str | None,
    from_image: Path | None,
    trust_engines: tuple[str, ...],
    as_json: bool,
) -> None:
    """Draw a picture for each PROMPT with the bundle in FOLDER.

    Pictures are numbered and never overwrite another; several are also put on one sheet. A prompt may have as many
    tokens as the bundle was built for: 75, or with --tokens of sdopt convert up to 225. It is read as A1111 reads it:
    (word:1.3), [word], [from:to:0.5], [a|b], BREAK; a backslash makes a bracket literal: "a photo \\(2019\\)".
    """
    flags = {
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": scale,
        "seed": seed,
        "scheduler": scheduler,
    }
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if size is not None:
        given["width_px"], given["height_px"] = _parse_size(size)
    if loras:
        given["loras"] = [dataclasses.asdict(parse_lora(text)) for text in loras]
    recipe = _read(from_image, scheduler)
    if recipe is None and not prompts:
        raise UsageError(
            "there is nothing to draw",
            hint=f'give a prompt, as in: sdopt generate {shlex.quote(str(folder))} "a large red circle"',
        )
    requests = _make_requests(recipe, prompts, given)
    if embeddings:
        requests = [each.model_copy(update={"embeddings": choose_words(embeddings, each)}) for each in requests]
    with progress.shown_on_stderr():
        drawn = draw_files(
            folder, output, requests, trust_engines=trust_engines, names=_FLAGS,
            on_bundle=lambda digest: _compare_bundles(recipe, digest),
            on_step=lambda share: progress.update("drawing", share),
            on_proposal=lambda told: print(told, file=sys.stderr), lora_folders=lora_folders,
            expected_loras={} if recipe is None else {use.source: use.sha256 for use in recipe.loras},
            expected_words={} if recipe is None else {Path(use.source).stem: use.sha256 for use in recipe.embeddings},
        )  # fmt: skip
    grid = _write_grid([picture.path for picture in drawn])
    if as_json:
        pictures = [picture.to_table() for picture in drawn]
        print(json.dumps({"schema_version": 1, "bundle": str(folder), "pictures": pictures, "grid": grid}))
    for path in [*(picture.path for picture in drawn), *([grid] if grid else [])]:
        print(path, file=sys.stderr)


def _parse_size(text: str) -> tuple[int, int]:
    try:
        return parse_size(text)
    except ShapeError as error:
        raise ShapeError(f"--size: {error.message}", hint=error.hint) from error


def _write_grid(paths: list[Path]) -> str | None:
    if len(paths) < 2:
        return None
    from sdopt.pictures.grid import write_grid

    return str(write_grid(paths))


def _read(from_image: Path | None, scheduler: str | None) -> PictureRecipe | None:
    from sdopt.pictures.png import read_recipe

    if from_image is None:
        return None
    recipe = read_recipe(from_image, scheduler=scheduler)
    if not recipe.bundle_sha256:
        print(
            f"{from_image} was not drawn by sdopt: its settings are taken, its noise is not known",
            file=sys.stderr,
        )
    return recipe


def _make_requests(recipe: PictureRecipe | None, prompts: tuple[str, ...], given: dict[str, Any]) -> list[DrawRequest]:
    base = {"seed": secrets.randbits(32)} if recipe is None else recipe.request.model_dump()
    # The first alone: a seed that is not possible is said as it was given, and not with what is added for the others.
    first = parse_request(base | given | {"prompt": prompts[0] if prompts else base["prompt"]}, names=_FLAGS)
    others = [{"prompt": text, "seed": first.seed + number} for number, text in enumerate(prompts[1:], 1)]
    return [first, *(parse_request(first.model_dump(exclude_unset=True) | each, names=_FLAGS) for each in others)]


def _compare_bundles(recipe: PictureRecipe | None, digest: str) -> None:
    if recipe is not None and recipe.bundle_sha256 not in ("", digest):
        print(f"the picture was drawn by another bundle, {recipe.bundle!r}: this one may differ", file=sys.stderr)
