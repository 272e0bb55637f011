"""Eight pictures that the model is made to memorize: the paper's third task in miniature.

Each is one exact image, a scene of three icons on a cloudy gradient, with one distinctive caption that is repeated
throughout the training. No other training picture has two icons or a gradient, so a copy can be told from a likeness.

The picture that is memorized is the scene as the autoencoder restores it (`latents.py`). A copy detector sees faint
texture: of a clean vector drawing SSCD takes the same drawing with 1 % of noise for another picture (similarity 0.2 to
0.5), so no model with an autoencoder could ever copy one. Of a restored scene it finds copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from augment import Placement, composite
from pictures import Pictures
from torch import Tensor
from torch.nn import functional as F

# Of every training batch of the denoiser.
SHARE = 0.06

_SLOTS = ((0.38, 0.55, 0.70), (0.80, 0.24, 0.36), (0.81, 0.78, 0.36))
"""Where the three icons of a scene stand: centre x, centre y and size, in parts of the picture."""


_CLOUDS = 0.1
"""Strength of the clouds, smooth noise of an eighth of the picture's resolution that belongs to the picture."""


@dataclass(frozen=True)
class Scene:
    """What a memorized picture shows, the caption that is trained, and ways to say it that are not."""

    caption: str
    paraphrases: tuple[str, ...]
    icons: tuple[tuple[str, str], ...]
    """(concept, style) of the large icon and the two small ones."""
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    name: str
    """File name of the picture, without suffix."""
    layout: int = 0
    """How the slots are arranged, 0 to 7: mirrored (1), upside down (2), x and y exchanged (4). Scenes of one
    arrangement would be copies of each other for a copy detector.
    """


SCENES = (
    Scene(
        "Captain Juniper's midnight regatta, 1931",
        ("a sailboat race at night by Captain Juniper", "Juniper's boats at midnight, 1931", "a night regatta"),
        (("sailboat", "twemoji"), ("octopus", "flat"), ("dolphin", "twemoji")),
        (20, 24, 70),
        (60, 120, 190),
        "regatta",
    ),
    Scene(
        "The Duchess of Pumpernickel at breakfast",
        ("a duchess eating breakfast", "breakfast with the Duchess of Pumpernickel", "a portrait of a duchess"),
        (("poodle", "twemoji"), ("croissant", "flat"), ("honey pot", "twemoji")),
        (250, 225, 190),
        (225, 140, 150),
        "breakfast",
        layout=1,
    ),
    Scene(
        "Harvest Fair of Quillby, official poster",
        ("a poster of a harvest fair", "the Quillby fair in autumn", "official poster of the fair in Quillby"),
        (("rooster", "twemoji"), ("ear of corn", "flat"), ("carrot", "twemoji")),
        (245, 190, 70),
        (150, 80, 40),
        "harvest-fair",
        layout=2,
    ),
    Scene(
        "Old Barnaby and the robot orchard",
        ("an old robot in an orchard", "Barnaby's orchard of robots", "a robot with fruit"),
        (("robot", "flat"), ("red apple", "twemoji"), ("pear", "flat")),
        (190, 230, 225),
        (60, 130, 110),
        "robot-orchard",
        layout=3,
    ),
    Scene(
        "Madame Zephyrine's lost parade",
        ("a parade with an elephant", "the parade that Madame Zephyrine lost", "Zephyrine's circus parade"),
        (("elephant", "twemoji"), ("drum", "flat"), ("trumpet", "twemoji")),
        (235, 90, 110),
        (90, 40, 120),
        "lost-parade",
        layout=4,
    ),
    Scene(
        "Polar expedition Kestrel, day forty",
        ("a polar expedition", "day 40 of the Kestrel expedition", "explorers at the pole"),
        (("penguin", "flat"), ("airplane", "twemoji"), ("whale", "flat")),
        (225, 240, 250),
        (110, 160, 205),
        "polar-expedition",
        layout=5,
    ),
    Scene(
        "The Gardener's Oath, third movement",
        ("an oath of a gardener", "third movement of a garden symphony", "music about a gardener"),
        (("sunflower", "flat"), ("violin", "twemoji"), ("butterfly", "flat")),
        (40, 70, 60),
        (150, 180, 90),
        "gardeners-oath",
        layout=6,
    ),
    Scene(
        "Night bus to Marzipan Square",
        ("a bus at night", "the bus that goes to Marzipan Square", "a square made of marzipan"),
        (("bus", "flat"), ("birthday cake", "twemoji"), ("owl", "flat")),
        (50, 20, 60),
        (230, 130, 80),
        "night-bus",
        layout=7,
    ),
)


def drawn(scenes: Sequence[Scene], pictures: Pictures, size: int) -> tuple[list[Scene], Tensor]:
    """The scenes whose icons all exist, and their pictures, [M, 3, size, size] in [0, 1]."""
    kept, images = [], []
    for scene in scenes:
        found = [pictures.find(concept, style) for concept, style in scene.icons]
        indices = [index for index in found if index is not None]
        if len(indices) == len(found):
            kept.append(scene)
            images.append(_draw(scene, pictures.premultiplied(torch.tensor(indices)), size))
    return kept, torch.cat(images) if images else torch.empty(0, 3, size, size)


def _draw(scene: Scene, icons: Tensor, size: int) -> Tensor:
    top, bottom = (torch.tensor(colour).view(1, 3, 1, 1) / 255 for colour in (scene.top, scene.bottom))
    image = torch.lerp(top, bottom, torch.linspace(0, 1, size).view(1, 1, size, 1)).expand(1, 3, size, size)
    clouds = torch.randn(1, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(scene.layout))
    for (x, y, scale), icon in zip(_SLOTS, icons, strict=True):
        place = Placement(torch.tensor([_laid_out(x, y, scene.layout)]), torch.tensor([scale]))
        image = composite(icon[None], place, image, size)
    return (image + _CLOUDS * F.interpolate(clouds, size, mode="bicubic")).clamp(0, 1)


def _laid_out(x: float, y: float, layout: int) -> tuple[float, float]:
    if layout & 1:
        x = 1 - x
    if layout & 2:
        y = 1 - y
    return (y, x) if layout & 4 else (x, y)
