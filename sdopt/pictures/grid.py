"""Several pictures on one sheet, to look at together."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sdopt.disk.files import write_file

_GAP_PX = 4
# Pictures of a small model are enlarged to be seen; pixels stay sharp.
_LEAST_SIDE_PX = 192


def paste_grid(images: Sequence[Image.Image]) -> Image.Image:
    """One RGB sheet, as square as the count allows, pictures in reading order. All have one size."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    scale = max(1, math.ceil(_LEAST_SIDE_PX / min(images[0].size)))
    width_px, height_px = (side * scale for side in images[0].size)
    sheet = Image.new(
        "RGB", (columns * (width_px + _GAP_PX) + _GAP_PX, rows * (height_px + _GAP_PX) + _GAP_PX), (128, 128, 128)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        place = (_GAP_PX + column * (width_px + _GAP_PX), _GAP_PX + row * (height_px + _GAP_PX))
        sheet.paste(image.resize((width_px, height_px), Image.Resampling.NEAREST), place)
    return sheet


def write_grid(paths: Sequence[Path]) -> Path:
    """Write the sheet of these pictures beside them, named after the first and the last number."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    buffer = io.BytesIO()
    paste_grid(images).save(buffer, "PNG")
    numbers = [path.name.split("-", 1)[0] for path in (paths[0], paths[-1])]
    sheet = paths[0].with_name(f"grid-{numbers[0]}-{numbers[1]}.png")
    write_file(sheet, buffer.getvalue())
    return sheet
