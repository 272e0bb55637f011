"""Contact sheets: the same prompts and seeds before and after an edit, as the paper's Fig. 5, 8 and 9 show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..files import replacing
from ..fonts import load_font
from .plan import Unit

COLUMNS = 6
"""Pictures of each unit, before and after."""

_TILE, _GAP, _MARGIN, _LABEL = 96, 3, 12, 18


def sample(images: np.ndarray, columns: int = COLUMNS) -> list[np.ndarray]:
    """The first picture of each prompt, then the second, and so on, at most `columns`.

    Copies, so that the rest of `images`, uint8 [prompts, seeds, height, width, 3], need not stay in memory.
    """
    prompts, seeds = images.shape[:2]
    places = [(prompt, seed) for seed in range(seeds) for prompt in range(prompts)]
    return [images[place].copy() for place in places[:columns]]


def write_sheet(path: Path, rows: Sequence[tuple[Unit, list[np.ndarray], list[np.ndarray]]]) -> None:
    """Write one row for each unit: pictures before the edit on the left, after it on the right.

    Raises:
        AblationError: the folder cannot be written.
    """
    half = max(len(before) for _, before, _ in rows) * (_TILE + _GAP)
    height = _LABEL + _TILE + 2 * _GAP
    canvas = Image.new("RGB", (max(3 * _MARGIN + 2 * half, 420), 2 * _MARGIN + height * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    font = load_font(11)
    for place, (unit, before, after) in enumerate(rows):
        top = _MARGIN + place * height
        draw.text((_MARGIN, top), f"{unit.role}: {unit.name}", "black", font)
        for left, pictures in ((_MARGIN, before), (2 * _MARGIN + half, after)):
            for column, picture in enumerate(pictures):
                tile = Image.fromarray(picture)
                tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
                canvas.paste(tile, (left + column * (_TILE + _GAP), top + _LABEL))
    with replacing(path) as temporary:
        canvas.save(temporary)
