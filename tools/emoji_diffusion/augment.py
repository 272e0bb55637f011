"""Place cut-out pictures on backgrounds, a batch at a time and in torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from captions import BACKGROUNDS, PLAIN, SIZES, Subject
from pictures import Pictures
from torch import Generator, Tensor
from torch.nn import functional as F

_COLOURS = tuple(BACKGROUNDS)
_RGB = torch.tensor(list(BACKGROUNDS.values())) / 255
PLAIN_SHARE = 0.4
"""Share of pictures on the plain background; the other colours share the rest evenly."""

SIZE_SHARES = (0.8, 0.1, 0.1)
_SIZE_RANGES = ((0.74, 0.84), (0.92, 0.99), (0.48, 0.58))
"""Edge of the icon in parts of the picture, for each of `SIZES`: apart, so that the words mean something."""

_WOBBLE = 0.03
"""How far from the centre the denoiser's icons stand, at most."""


@dataclass(frozen=True)
class Placement:
    """Where B icons stand on the canvas: `centre` [B, 2] (x, y) and `scale` [B], in parts of its edge."""

    centre: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Choice:
    """B training pictures: which picture, size and background each one is, int64 [B], and where it stands."""

    picture: Tensor
    size: Tensor
    background: Tensor
    placement: Placement

    def subjects(self, pictures: Pictures) -> list[Subject]:
        return [
            subject(pictures, *indices)
            for indices in zip(self.picture.tolist(), self.size.tolist(), self.background.tolist(), strict=True)
        ]


def subject(pictures: Pictures, picture: int, size: int, background: int) -> Subject:
    """What picture number `picture`, drawn in that size on that background, shows."""
    concept = pictures.concepts[int(pictures.concept[picture])]
    style = pictures.styles[int(pictures.style[picture])]
    return Subject(concept.name, concept.category, style, _COLOURS[background], SIZES[size])


def choose(picture: Tensor, rng: Generator) -> Choice:
    """A size, a background and a nearly central place for each of `picture` [B]: what the denoiser and judges see."""
    count = len(picture)
    size = torch.multinomial(torch.tensor(SIZE_SHARES), count, replacement=True, generator=rng)
    low, high = torch.tensor(_SIZE_RANGES)[size].unbind(1)
    scale = low + (high - low) * torch.rand(count, generator=rng)
    centre = 0.5 + _WOBBLE * (2 * torch.rand(count, 2, generator=rng) - 1)
    return Choice(picture, size, _backgrounds(count, rng), Placement(centre, scale))


def anywhere(count: int, rng: Generator) -> Placement:
    """Any size and place: what the autoencoder learns from, so that it knows no preferred pixel grid."""
    scale = 0.4 + 0.6 * torch.rand(count, generator=rng)
    room = (1 - scale[:, None]) / 2 + 0.05
    return Placement(0.5 + room * (2 * torch.rand(count, 2, generator=rng) - 1), scale)


def any_background(count: int, rng: Generator) -> Tensor:
    """Colours [B, 3, 1, 1]: of the list for one half, any at all for the other."""
    named = _RGB[_backgrounds(count, rng)]
    free = torch.rand(count, 3, generator=rng)
    return torch.where(torch.rand(count, 1, generator=rng) < 0.5, named, free).view(count, 3, 1, 1)


def draw(pictures: Pictures, choice: Choice, size: int) -> Tensor:
    """The chosen pictures, [B, 3, size, size] in [0, 1]."""
    background = _RGB[choice.background].view(-1, 3, 1, 1)
    return composite(pictures.premultiplied(choice.picture), choice.placement, background, size)


def composite(
    icons: Tensor, placement: Placement, background: Tensor, size: int, window: tuple[Tensor, int] | None = None
) -> Tensor:
    """Premultiplied icons [B, 4, S, S] over `background` (broadcast to [B, 3, …]) on a canvas of edge `size`.

    Args:
        window: corner (x, y) in whole pixels [B, 2] and edge of the part of the canvas to draw; None is all of it.

    Returns:
        [B, 3, edge, edge] in [0, 1].
    """
    corner, edge = window or (torch.zeros(len(icons), 2), size)
    pixel = torch.arange(edge) + 0.5
    # position of each output pixel on the canvas, then on the icon, in grid_sample's [-1, 1]
    x = ((corner[:, 0, None] + pixel) / size - placement.centre[:, 0, None]) / placement.scale[:, None] * 2
    y = ((corner[:, 1, None] + pixel) / size - placement.centre[:, 1, None]) / placement.scale[:, None] * 2
    grid = torch.stack((x[:, None, :].expand(-1, edge, -1), y[:, :, None].expand(-1, -1, edge)), dim=-1)
    placed = F.grid_sample(icons, grid, align_corners=False)
    return placed[:, :3] + (1 - placed[:, 3:]) * background


def _backgrounds(count: int, rng: Generator) -> Tensor:
    shares = torch.full((len(_COLOURS),), (1 - PLAIN_SHARE) / (len(_COLOURS) - 1))
    shares[_COLOURS.index(PLAIN)] = PLAIN_SHARE
    return torch.multinomial(shares, count, replacement=True, generator=rng)
