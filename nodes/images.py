"""Pictures on their way from the core to ComfyUI: IMAGE tensors, previews, thumbnails."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_CURVE_SIZE = (480, 240)
_MARGIN, _HEADER = 10, 22
_PAPER, _INK, _LINE = "#ffffff", "#1f2328", "#2a6467"


def as_image(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] or [H, W, 3] -> ComfyUI's IMAGE, fp32 [N, H, W, 3] in [0, 1]."""
    batch = pictures if pictures.ndim == 4 else pictures[None]
    return torch.from_numpy(np.ascontiguousarray(batch)).float() / 255


def as_picture(image: Tensor) -> Image.Image:
    """One of an IMAGE, fp32 [H, W, 3] in [0, 1], as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())


def picture_as_image(picture: Image.Image) -> Tensor:
    """One picture as an IMAGE of one."""
    return as_image(np.array(picture.convert("RGB")))


def png_as_image(data: bytes) -> Tensor:
    """A PNG file's content as an IMAGE of one."""
    return picture_as_image(Image.open(io.BytesIO(data)))


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side in about as many rows as columns; there is at least one."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    canvas = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % columns * width, index // columns * height))
    return canvas


def data_uri(picture: np.ndarray, longest: int = 128) -> str:
    """uint8 [H, W, 3] as a small JPEG in a data URI; a picture longer than `longest` pixels is scaled down to that."""
    small = Image.fromarray(picture)
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def loss_curve(losses: Sequence[float]) -> Image.Image:
    """A small picture of the losses so far, from 0 to the largest; there is at least one, and all are finite."""
    width, height = _CURVE_SIZE
    # more points than pixels would only blur the line
    means = [float(chunk.mean()) for chunk in np.array_split(np.array(losses), min(len(losses), width // 2))]
    largest = max(*means, 1e-12)
    right, bottom = width - _MARGIN, height - _MARGIN
    points = [
        (
            _MARGIN + (right - _MARGIN) * (index / max(1, len(means) - 1)),
            bottom - (bottom - _MARGIN - _HEADER) * (value / largest),
        )
        for index, value in enumerate(means)
    ]
    canvas = Image.new("RGB", _CURVE_SIZE, _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 4), f"step {len(losses)}, loss {losses[-1]:.3g}", _INK)
    draw.line((_MARGIN, bottom, right, bottom), fill=_INK)
    draw.line(points if len(points) > 1 else [*points, (points[0][0] + 2, points[0][1])], fill=_LINE, width=2)
    return canvas
