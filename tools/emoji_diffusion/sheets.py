"""Contact sheets: generated pictures in a labelled grid, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from concept_ablation.core.files import replacing

_LABEL = 16
_GAP = 4


def write_sheet(path: Path, images: np.ndarray, labels: Sequence[str], columns: int) -> None:
    """Write pictures, uint8 [N, H, W, 3], row by row, each with its label below."""
    height, width = images.shape[1:3]
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, lines * (height + _LABEL + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = _GAP + index % columns * (width + _GAP)
        top = _GAP + index // columns * (height + _LABEL + _GAP)
        sheet.paste(Image.fromarray(image), (left, top))
        pen.text((left, top + height + 1), _fitting(label, width, font), fill="black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary)


def _fitting(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while label and font.getlength(label) > width:
        label = label[:-1]
    return label
