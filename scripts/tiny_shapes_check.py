#!/usr/bin/env python3
"""Draw what `tiny-shapes` is asked for, read the pictures back by their pixels, and count what is right.

The one place that knows the vocabulary of `tiny-shapes`, how a scene is written as a prompt, how it is drawn
for training, and how a picture is judged. The judge reads pixels alone: it knows no model and no training, so
the same counts compare a checkpoint with its quantised or compiled self. Only the command needs torch.

    python scripts/tiny_shapes_check.py sdopt/assets/tiny-shapes --prompts 500 --seed 5 --json out.json

A bundle takes as many pictures at a time as it was built for: `--batch 1`, where it was built with the default.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IMAGE_PX = 64
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.17, "large": 0.30}
"""Radius, as a share of the picture's side."""
PLACES = {
    "left": (0.3, 0.5),
    "right": (0.7, 0.5),
    "top": (0.5, 0.3),
    "bottom": (0.5, 0.7),
    "centre": (0.5, 0.5),
}
"""Centre (x, y), as a share of the picture's side."""

PLACE_JITTER = 0.02
SIZE_JITTER = 0.05
SUPERSAMPLING = 4

CORNER_PX = 5
COLOUR_TOLERANCE = 60.0
"""RGB distance from its nearest named colour beyond which a colour has no name."""
CONTRAST = 35.0
"""RGB distance from the ground above which a pixel can belong to a shape: half of orange to yellow."""
PLACE_TOLERANCE = 0.1
"""Half the distance from the centre to any other place, as a share of the picture's side."""
CANVAS_PX = 2 * IMAGE_PX
LEAST_OVERLAP = 0.75
"""Intersection over union with the best fitting outline below which a blob is not a shape."""

FILE = click.Path(dir_okay=False, path_type=Path)
STEPS = 20
GUIDANCE = 4.0

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """One coloured shape on a coloured ground."""

    shape: str
    colour: str
    ground: str
    size: str
    place: str


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it shows nothing of the vocabulary."""

    shape: str | None
    colour: str | None
    ground: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True)
class Verdict:
    """Which attributes of the wanted scene a picture shows."""

    shape: bool
    colour: bool
    ground: bool
    size: bool
    place: bool

    @property
    def everything(self) -> bool:
        return self.shape and self.colour and self.ground and self.size and self.place


def sample_scene(rng: random.Random) -> Scene:
    """Take every attribute at random; the shape's colour is never the ground's."""
    colour, ground = rng.sample(list(COLOURS), 2)
    return Scene(rng.choice(SHAPES), colour, ground, rng.choice(list(SIZES)), rng.choice(list(PLACES)))


def write_prompt(scene: Scene) -> str:
    """Write the full sentence of the prompt grammar."""
    return f"a {scene.size} {scene.colour} {scene.shape} on a {scene.ground} background, {scene.place}"


def draw_scene(scene: Scene, rng: random.Random | None = None, line_px: float | None = None) -> Pixels:
    """Draw a scene, `uint8 [64, 64, 3]`; with `rng`, place and size are jittered as in the training data.

    With `line_px` the shape is an outline of that width, inside its edge, and the ground shows through.
    """
    dx, dy, scale = 0.0, 0.0, 1.0
    if rng is not None:
        dx, dy = rng.uniform(-PLACE_JITTER, PLACE_JITTER), rng.uniform(-PLACE_JITTER, PLACE_JITTER)
        scale = rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    x, y = PLACES[scene.place]
    side = IMAGE_PX * SUPERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS[scene.ground])
    place = ((x + dx) * side, (y + dy) * side)
    radius_px = SIZES[scene.size] * scale * side
    _draw_outline(ImageDraw.Draw(image), scene.shape, place, radius_px, fill=COLOURS[scene.colour])
    if line_px is not None:
        # A border of zeros would count as an edge: a shape that the picture cuts has no line along the cut.
        whole = Image.new("L", (2 * side, 2 * side), 0)
        centre = (place[0] + side / 2, place[1] + side / 2)
        _draw_outline(ImageDraw.Draw(whole), scene.shape, centre, radius_px, fill=1)
        inside = distance_transform_edt(np.asarray(whole)) > line_px * SUPERSAMPLING
        start = side // 2
        image.paste(COLOURS[scene.ground], mask=Image.fromarray(inside[start : start + side, start : start + side]))
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS))


def _draw_outline(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre_px: tuple[float, float],
    radius_px: float,
    fill: int | tuple[int, int, int],
) -> None:
    x, y = centre_px
    if shape == "circle":
        canvas.ellipse((x - radius_px, y - radius_px, x + radius_px, y + radius_px), fill=fill)
    elif shape == "square":
        half = 0.85 * radius_px
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        radii = (1.1,) * 3 if shape == "triangle" else (1.1, 0.462) * 5
        angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
        corners = [
            (x + r * radius_px * np.sin(angle), y - r * radius_px * np.cos(angle))
            for r, angle in zip(radii, angles, strict=True)
        ]
        canvas.polygon(corners, fill=fill)


def judge_image(pixels: Pixels, wanted: Scene) -> Verdict:
    """Say which attributes of `wanted` the picture `uint8 [64, 64, 3]` shows."""
    shown = read_image(pixels)
    return Verdict(**{f.name: getattr(shown, f.name) == getattr(wanted, f.name) for f in fields(Verdict)})


def read_image(pixels: Pixels) -> Reading:
    """Read ground, colour, shape, size and place off a picture `uint8 [64, 64, 3]`.

    The ground is the corners' median colour. What differs from it is the blob; the outline of the vocabulary
    that covers it best, at any position and any radius, gives shape, size and place together, so that a shape
    cut by the picture's edge is still placed by its true centre.
    """
    shape_px = (IMAGE_PX, IMAGE_PX, 3)
    if pixels.shape != shape_px or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 {list(shape_px)}, got {pixels.dtype} {list(pixels.shape)}")
    ground_rgb = _measure_ground(pixels)
    ground = _name_colour(ground_rgb)
    found = _find_blob(pixels, ground_rgb)
    if found is None:
        return Reading(None, None, ground, None, None)
    blob, colour_rgb = found
    fit = _fit_outline(blob)
    if fit is None:
        return Reading(None, _name_colour(colour_rgb), ground, None, None)
    shape, radius, centre = fit
    return Reading(shape, _name_colour(colour_rgb), ground, _name_size(radius), _name_place(centre))


def measure_filling(pixels: Pixels, scene: Scene, margin_px: float = 5.5) -> float:
    """How much of the shape's inside has its colour: 1 for a filled shape of `scene`, 0 where the ground shows.

    The inside is what lies `margin_px` and more from the shape's edge; of a small star nothing does, an error.
    """
    drawn = draw_scene(replace(scene, colour="white", ground="black"))[..., 0] > 127
    inside = distance_transform_edt(np.pad(drawn, 1))[1:-1, 1:-1] > margin_px
    if not inside.any():
        raise ValueError(f"nothing of a {scene.size} {scene.shape} is {margin_px} px from its edge")
    colour, ground = (np.array(COLOURS[name], dtype=float) for name in (scene.colour, scene.ground))
    way = colour - ground
    return float(np.clip((pixels[inside] - ground) @ way / (way @ way), 0, 1).mean())


def measure_palette_distance(pixels: Pixels, names: Sequence[str]) -> float:
    """Mean RGB distance of the pixels from the nearest of these colours."""
    colours = np.array([COLOURS[name] for name in names], dtype=float)
    distances = np.linalg.norm(pixels.astype(float)[..., None, :] - colours, axis=-1)
    return float(distances.min(axis=-1).mean())


def _measure_ground(pixels: Pixels) -> NDArray[np.float64]:
    ends = np.r_[:CORNER_PX, -CORNER_PX:0]
    corners = pixels[np.ix_(ends, ends)].reshape(-1, 3)
    return np.asarray(np.median(corners, axis=0), dtype=np.float64)


def _find_blob(pixels: Pixels, ground_rgb: NDArray[np.float64]) -> tuple[Mask, NDArray[np.float64]] | None:
    """Split shape from ground half way between their colours, where anti-aliasing puts the true edge."""
    distance = np.linalg.norm(pixels.astype(float) - ground_rgb, axis=2)
    rough = distance > CONTRAST
    if rough.sum() < 20:
        return None
    inner = distance > 0.8 * np.percentile(distance[rough], 75)
    colour_rgb = np.median(pixels[inner].astype(float), axis=0)
    return distance > 0.5 * np.linalg.norm(colour_rgb - ground_rgb), colour_rgb


def _name_colour(rgb: NDArray[np.float64]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOUR_TOLERANCE else None


def _name_size(radius: float) -> str:
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))


def _name_place(centre: tuple[float, float]) -> str | None:
    near = (
        name
        for name, place in PLACES.items()
        if all(abs(a - b) < PLACE_TOLERANCE for a, b in zip(centre, place, strict=True))
    )
    return next(near, None)


def _fit_outline(blob: Mask) -> tuple[str, float, tuple[float, float]] | None:
    """Return shape, radius and centre (shares of the side) of the best outline, None when none fits well.

    Cross-correlation over a canvas of twice the side gives the overlap at every whole-pixel position. What an
    outline has outside the picture is not counted against it.
    """
    outlines = _outlines()
    area = int(blob.sum())
    # A good overlap needs an outline about as large as the blob, or larger where the picture cuts it.
    able = np.flatnonzero((outlines.areas_px > LEAST_OVERLAP * area) & (outlines.areas_px < 2 * area))
    if not able.size:
        return None
    both = _correlate(blob, outlines.spectra[able])
    overlap = both / np.maximum(area + outlines.areas_inside_px[able] - both, 1.0)
    best, y, x = np.unravel_index(int(overlap.argmax()), overlap.shape)
    if overlap[best, y, x] < LEAST_OVERLAP:
        return None
    centre = (_unwrap_shift(int(x)), _unwrap_shift(int(y)))
    return outlines.names[able[best]], outlines.radii[able[best]], centre


def _correlate(mask: Mask, spectra: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Count the pixels shared by a mask and each outline at each shift, `[outlines, 128, 128]`."""
    spectrum = np.fft.rfft2(mask.astype(float), s=(CANVAS_PX, CANVAS_PX))
    return np.fft.irfft2(spectrum * spectra.conj(), s=(CANVAS_PX, CANVAS_PX))


def _unwrap_shift(shift_px: int) -> float:
    """Turn a shift that wraps round the canvas into the centre of an outline that was drawn in the middle."""
    return 0.5 + ((shift_px + IMAGE_PX) % CANVAS_PX - IMAGE_PX) / IMAGE_PX


@dataclass(frozen=True)
class _Outlines:
    """Every shape at every radius: where its pixels are, as spectra, and how many it has."""

    names: list[str]
    radii: list[float]
    spectra: NDArray[np.complex128]
    areas_px: NDArray[np.float64]
    areas_inside_px: NDArray[np.float64]


@cache
def _outlines() -> _Outlines:
    kinds = [(shape, float(radius)) for shape in SHAPES for radius in np.arange(0.12, 0.36, 0.01)]
    masks = np.stack([_mask_outline(shape, radius) for shape, radius in kinds]).astype(float)
    spectra = np.fft.rfft2(masks, s=(CANVAS_PX, CANVAS_PX))
    whole_picture = np.ones((IMAGE_PX, IMAGE_PX), dtype=bool)
    return _Outlines(
        names=[shape for shape, _ in kinds],
        radii=[radius for _, radius in kinds],
        spectra=spectra,
        areas_px=masks.sum(axis=(1, 2)),
        areas_inside_px=_correlate(whole_picture, spectra),
    )


def _mask_outline(shape: str, radius: float) -> Mask:
    side = IMAGE_PX * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    _draw_outline(ImageDraw.Draw(image), shape, (side / 2, side / 2), radius * side, fill=255)
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX)) > 127


def open_pipeline(folder: Path) -> "DiffusionPipeline":
    """A checkpoint in torch and float32, or a bundle with its engines."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    import sdopt

    if (folder / "bundle.json").is_file():
        pipe = sdopt.load(folder)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with_model(folder: Path, prompts: Sequence[str], seed: int, batch: int) -> Iterator[Pixels]:
    """Draw each prompt with 20 Euler steps at guidance 4, `uint8 [64, 64, 3]` each.

    The noise of prompt `i` is seeded by `seed + i`: the pictures do not depend on the batch size.
    """
    import torch

    pipe = open_pipeline(folder)
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        seeds = range(seed + start, seed + start + len(chunk))
        images = pipe(
            chunk,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images
        yield from (np.asarray(image) for image in images)


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of a check: the same for everyone who names the same count and seed."""
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def count_right(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures with each attribute right, and with all of them right (`everything`)."""
    names = [*(f.name for f in fields(Verdict)), "everything"]
    return {name: sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in names}


def paste_grid(images: Sequence[Pixels], columns: int = 10, rows: int = 5) -> Image.Image:
    """Lay the first pictures out, each at twice its size."""
    cell = 2 * IMAGE_PX + 4
    grid = Image.new("RGB", (columns * cell, rows * cell), "grey")
    for i, pixels in enumerate(images[: columns * rows]):
        tile = Image.fromarray(pixels).resize((2 * IMAGE_PX, 2 * IMAGE_PX), Image.Resampling.NEAREST)
        grid.paste(tile, (i % columns * cell + 2, i // columns * cell + 2))
    return grid


@click.command(help=(__doc__ or "").split("\n", 1)[0])
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompts", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=5, show_default=True, help="Of the scenes and of the noise.")
@click.option("--batch", default=25, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "json_file", type=FILE, help="Write the scores and what went wrong here.")
@click.option("--grid", type=FILE, help="Write the first 50 pictures here.")
def main(folder: Path, prompts: int, seed: int, batch: int, json_file: Path | None, grid: Path | None) -> None:
    scenes = sample_scenes(prompts, seed)
    images = list(draw_with_model(folder, [write_prompt(scene) for scene in scenes], seed, batch))
    verdicts = [judge_image(image, scene) for image, scene in zip(images, scenes, strict=True)]
    shares = count_right(verdicts)
    for name, share in shares.items():
        click.echo(f"{name:>10}  {share:6.1%}")
    if json_file is not None:
        wrong = [
            {"index": i, "prompt": write_prompt(scene), "shown": asdict(read_image(image))}
            for i, (scene, image, verdict) in enumerate(zip(scenes, images, verdicts, strict=True))
            if not verdict.everything
        ]
        method = {"prompts": prompts, "seed": seed, "sampler": "euler", "steps": STEPS, "guidance": GUIDANCE}
        report = {"method": method, "right": shares, "wrong": wrong}
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if grid is not None:
        paste_grid(images).save(grid)


if __name__ == "__main__":
    main()
