"""Between stages 1 and 2: encode every picture several times, so that the denoiser's training runs no autoencoder.

One round encodes each picture once, with a background, size and place of its own. Rounds are files: a killed run goes
on with the next one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from augment import Choice, Placement, choose, draw, subject
from captions import Subject
from compute import fast_forward
from diffusers import AutoencoderTiny
from memorized import drawn
from pictures import Pictures
from safetensors.torch import load_file, save_file
from settings import Settings
from torch import Tensor

from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import replacing

_BATCH = 32
_SCENES_FILE = "scenes.safetensors"


@dataclass(frozen=True)
class Latents:
    """Training latents in the autoencoder's own scale, and what each shows.

    Attributes:
        values: fp16 [N, 4, h, w].
        picture, size, background: indices of each, int64 [N].
        scenes: the memorized pictures' latents, fp16 [M, 4, h, w].
        scale: what brings `values` to a standard deviation of 1.
    """

    values: Tensor
    picture: Tensor
    size: Tensor
    background: Tensor
    scenes: Tensor
    scale: float

    def subject(self, pictures: Pictures, index: int) -> Subject:
        return subject(pictures, *(int(part[index]) for part in (self.picture, self.size, self.background)))


def encode_pictures(
    autoencoder: AutoencoderTiny, pictures: Pictures, settings: Settings, folder: Path, minutes: float
) -> None:
    """Write the rounds that are not there yet, at least one, until all are there or the time is over."""
    began = time.monotonic()
    _, scenes = drawn(settings.scenes, pictures, settings.image_size)
    images = _restored(autoencoder, scenes)
    _write(folder / _SCENES_FILE, {"values": _encode(autoencoder, images / 255), "images": images})
    for number in range(settings.latent_rounds):
        path = folder / f"round-{number:03d}.safetensors"
        if path.is_file():
            continue
        if number and time.monotonic() - began > minutes * 60:
            break
        rng = torch.Generator().manual_seed(settings.seed + number)
        choice: Choice = choose(torch.arange(len(pictures)), rng)
        # drawn batch by batch: all at once would be 3 GB
        parts = []
        for rows in torch.arange(len(pictures)).split(_BATCH):
            part = Choice(choice.picture[rows], choice.size[rows], choice.background[rows], _rows(choice, rows))
            parts.append(_encode(autoencoder, draw(pictures, part, settings.image_size)))
        _write(
            path,
            {
                "values": torch.cat(parts),
                "picture": choice.picture,
                "size": choice.size,
                "background": choice.background,
            },
        )
        print(f"latents: round {number + 1} of {settings.latent_rounds}", flush=True)


def load_latents(folder: Path) -> Latents:
    """All rounds in `folder`.

    Raises:
        AblationError: there are none.
    """
    paths = sorted(folder.glob("round-*.safetensors"))
    if not paths:
        raise AblationError(f"{folder} holds no latents: run the stage latents first.")
    rounds = [load_file(path) for path in paths]
    joined = {name: torch.cat([one[name] for one in rounds]) for name in rounds[0]}
    # of the first round alone, so that more rounds do not change the scale of a model in training
    scale = 1 / rounds[0]["values"].float().std().item()
    return Latents(**joined, scenes=load_file(folder / _SCENES_FILE)["values"], scale=scale)


def memorized_pictures(folder: Path) -> Tensor:
    """The pictures that are memorized, one of each scene in their order, uint8 [M, 3, H, W].

    Raises:
        AblationError: there are none.
    """
    path = folder / _SCENES_FILE
    if not path.is_file():
        raise AblationError(f"{folder} holds no latents: run the stage latents first.")
    return load_file(path)["images"]


@torch.no_grad()
def _restored(autoencoder: AutoencoderTiny, images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] as the autoencoder gives them back, uint8."""
    if not len(images):
        return images.byte()
    restored = autoencoder.decode(autoencoder.encode(images * 2 - 1).latents).sample / 2 + 0.5
    return (restored.clamp(0, 1) * 255).round().byte().contiguous()


def _rows(choice: Choice, rows: Tensor) -> Placement:
    return Placement(choice.placement.centre[rows], choice.placement.scale[rows])


@torch.no_grad()
def _encode(autoencoder: AutoencoderTiny, images: Tensor) -> Tensor:
    if not len(images):
        return torch.empty(0, dtype=torch.float16)
    with fast_forward():
        images = (images * 2 - 1).to(memory_format=torch.channels_last)
        return autoencoder.encode(images).latents.contiguous().half()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary)
