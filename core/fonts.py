"""The font of everything that is written into a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import ImageFont


def load_font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    """matplotlib's own font, which knows far more alphabets than the one built into Pillow.

    Args:
        size: in pixels.
        style: "" for the plain one, or the end of a file name, such as "-Bold".
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{style}.ttf"
    # Pillow 9 takes no path
    return ImageFont.truetype(str(path), size)
