"""`sdopt generate`: pictures from a bundle, each with the recipe that draws it again."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from sdopt import progress
from sdopt.cli.text import TRUST_ENGINE_HELP
from sdopt.disk.files import disk_errors
from sdopt.errors import UsageError
from sdopt.model.shape import parse_size
from sdopt.pipeline.schedulers import SchedulerName
from sdopt.tasks.draw import GenerateRequest, parse_request

if TYPE_CHECKING:
    from sdopt.pictures.png import PictureRecipe
    from sdopt.pipeline.opened import OpenedBundle

_NAMES = ", ".join(SchedulerName)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompts", metavar="PROMPT…", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("pictures"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--negative", metavar="TEXT", help="What the pictures should not show.")
@click.option("--steps", type=int, help="Steps of the scheduler.  [default: 20]")
@click.option("--scale", type=float, help="How strongly the prompt guides; up to 1 is not at all.  [default: 7.5]")
@click.option("--seed", type=int, help="Seed of the first picture, one more for each further one.  [default: random]")
@click.option("--size", metavar="WxH", help="One that the bundle was built for.  [default: its first]")
@click.option("--scheduler", metavar="NAME", help=f"One of {_NAMES}.  [default: the checkpoint's own]")
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
    scheduler: str | None,
    from_image: Path | None,
    trust_engines: tuple[str, ...],
    as_json: bool,
) -> None:
    """Draw a picture for each PROMPT with the bundle in FOLDER.

    Pictures are numbered and never overwrite another; several are put on one sheet, too. A prompt may have as many
    tokens as the bundle was built for: 75, or with --tokens of sdopt convert up to 225.
    """
    flags = {
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": scale,
        "seed": seed,
        "scheduler": scheduler,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if size is not None:
        given["width_px"], given["height_px"] = parse_size(size)
    recipe = _read(from_image)
    requests = _make_requests(recipe, prompts, given)
    if output.suffix.lower() == ".png":
        raise UsageError(
            f"-o takes a folder, and {output} looks like a picture",
            hint=f"sdopt numbers and names the pictures: -o {output.parent}",
        )
    with progress.shown_on_stderr():
        drawn = _draw_into(folder, output, requests, recipe, trust_engines)
    grid = _write_grid([Path(picture["path"]) for picture in drawn])
    if as_json:
        print(json.dumps({"schema_version": 1, "bundle": str(folder), "pictures": drawn, "grid": grid}))
    for path in [*(picture["path"] for picture in drawn), *([grid] if grid else [])]:
        print(path, file=sys.stderr)


def _write_grid(paths: list[Path]) -> str | None:
    if len(paths) < 2:
        return None
    from sdopt.pictures.grid import write_grid

    return str(write_grid(paths))


def _read(from_image: Path | None) -> PictureRecipe | None:
    from sdopt.pictures.png import read_recipe

    if from_image is None:
        return None
    recipe = read_recipe(from_image)
    if not recipe.bundle_sha256:
        print(
            f"{from_image} was not drawn by sdopt: its settings are taken, its noise is not known",
            file=sys.stderr,
        )
    return recipe


def _make_requests(
    recipe: PictureRecipe | None, prompts: tuple[str, ...], given: dict[str, Any]
) -> list[GenerateRequest]:
    if recipe is None and not prompts:
        raise UsageError(
            "there is nothing to draw",
            hint='give a prompt, as in: sdopt generate FOLDER "a large red circle"',
        )
    base = {"seed": secrets.randbits(32)} if recipe is None else recipe.request.model_dump()
    base |= given
    texts = prompts or (base["prompt"],)
    return [parse_request(base | {"prompt": text, "seed": base["seed"] + i}) for i, text in enumerate(texts)]


def _draw_into(
    folder: Path,
    output: Path,
    requests: list[GenerateRequest],
    recipe: PictureRecipe | None,
    trust_engines: tuple[str, ...],
) -> list[dict[str, Any]]:
    from sdopt.pipeline.load import close_engines, load_pipeline
    from sdopt.pipeline.opened import opened_bundle
    from sdopt.tasks.draw import generate_all

    _make_folder(output)
    pipe = load_pipeline(folder, trust_engines=trust_engines)
    try:
        pipe.set_progress_bar_config(disable=True)
        bundle = opened_bundle(pipe)
        if recipe is not None and recipe.bundle_sha256 not in ("", bundle.digest):
            print(
                f"the picture was drawn by another bundle, {recipe.bundle!r}: this one may differ",
                file=sys.stderr,
            )
        images = generate_all(pipe, requests, on_step=lambda share: progress.update("drawing", share))
        return [
            _write(output, image, request, bundle, pipe.scheduler)
            for request, image in zip(requests, images, strict=True)
        ]
    finally:
        close_engines(pipe)


def _write(
    output: Path, image: Any, request: GenerateRequest, bundle: OpenedBundle, own_scheduler: Any
) -> dict[str, Any]:
    import sdopt
    from sdopt.pictures.png import PictureRecipe, write_picture
    from sdopt.pipeline.schedulers import SCHEDULERS, label_of

    manifest = bundle.manifest
    sampler = label_of(own_scheduler) if request.scheduler is None else SCHEDULERS[request.scheduler].label
    recipe = PictureRecipe(sdopt=sdopt.__version__, bundle=manifest.name, bundle_sha256=bundle.digest, request=request)
    path = write_picture(output, image, recipe, sampler=sampler, model_hash=manifest.source.digest[:10])
    return {
        "path": str(path),
        "sampler": sampler,
        **request.model_dump(mode="json"),
        "width_px": image.width,
        "height_px": image.height,
    }


def _make_folder(output: Path) -> None:
    try:
        with disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{output} cannot be a folder: a file is in its place", hint="choose another with -o"
        ) from error
