"""Several pictures on one sheet: each whole, in reading order, in a place of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt.pictures.grid import paste_grid, write_grid


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (512, 256)])
def test_every_picture_is_whole_and_in_order(count: int, size: tuple[int, int]) -> None:
    images = [Image.new("RGB", size, (index + 1, 0, 255 - index)) for index in range(count)]
    sheet = np.asarray(paste_grid(images))
    scale = max(1, -(-192 // min(size)))
    centres = []
    for index in range(count):
        mask = (sheet == (index + 1, 0, 255 - index)).all(axis=2)
        assert mask.sum() == size[0] * size[1] * scale**2
        ys, xs = np.nonzero(mask)
        centres.append((int(ys.mean()), int(xs.mean())))
    assert centres == sorted(centres)


def test_sheet_lies_beside_its_pictures_and_is_named_after_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:05}-1-a.png" for number in (7, 8, 9)]
    for path in paths:
        Image.new("RGB", (64, 64), (200, 10, 10)).save(path)
    sheet = write_grid(paths)
    assert sheet == tmp_path / "grid-00007-00009.png"
    with Image.open(sheet) as image:
        assert image.format == "PNG"
