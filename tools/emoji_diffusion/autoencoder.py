"""Stage 1: the autoencoder (diffusers' AutoencoderTiny), on crops of pictures placed anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from augment import any_background, anywhere, composite
from compute import fast_forward
from convolution import speed_up
from diffusers import AutoencoderTiny
from memorized import drawn
from pictures import Pictures
from settings import Settings
from stage import Budget, Loss, Stage, train
from torch import Generator, Tensor, nn
from torch.nn import functional as F

_SCENE_SHARE = 0.12
_LATENT_NOISE = 0.05
_MSE_WEIGHT = 2.0


def build(settings: Settings) -> AutoencoderTiny:
    """An untrained autoencoder, the same for the same seed."""
    torch.manual_seed(settings.seed)
    return speed_up(AutoencoderTiny(**settings.autoencoder)).to(memory_format=torch.channels_last)


def train_autoencoder(pictures: Pictures, settings: Settings, folder: Path, budget: Budget) -> AutoencoderTiny:
    """The trained autoencoder (moving average)."""
    optimization = settings.autoencoder_optimization
    loss = reconstruction_loss(pictures, settings)
    stage = Stage("autoencoder", build(settings), loss, optimization, settings.seed)
    return train(stage, folder, budget)


def reconstruction_loss(pictures: Pictures, settings: Settings) -> Loss:
    """L1 + L1 of the gradients + 2 MSE of random crops; the latents get a little noise, as sampled ones have."""
    _, scenes = drawn(settings.scenes, pictures, settings.image_size)
    batch = settings.autoencoder_optimization.batch

    def loss(model: nn.Module, rng: Generator) -> Tensor:
        images = crops(pictures, scenes, batch, settings, rng)
        images = (images * 2 - 1).to(memory_format=torch.channels_last)
        with fast_forward():
            latents = model.encode(images).latents
            noise = torch.randn(latents.shape, generator=rng)
            restored = model.decode(latents + _LATENT_NOISE * noise).sample
        restored = restored.float()
        across, down = restored.diff(dim=3) - images.diff(dim=3), restored.diff(dim=2) - images.diff(dim=2)
        return (
            F.l1_loss(restored, images)
            + across.abs().mean()
            + down.abs().mean()
            + _MSE_WEIGHT * F.mse_loss(restored, images)
        )

    return loss


def crops(pictures: Pictures, scenes: Tensor, count: int, settings: Settings, rng: Generator) -> Tensor:
    """Random windows [count, 3, crop, crop] in [0, 1], most of a picture and some of a scene."""
    room = settings.image_size - settings.crop + 1
    corner = torch.randint(room, (count, 2), generator=rng)
    index = torch.randint(len(pictures), (count,), generator=rng)
    images = composite(
        pictures.premultiplied(index),
        anywhere(count, rng),
        any_background(count, rng),
        settings.image_size,
        (corner, settings.crop),
    )
    for row in range(round(_SCENE_SHARE * count) if len(scenes) else 0):
        x, y = corner[row].tolist()
        scene = scenes[int(torch.randint(len(scenes), (), generator=rng))]
        images[row] = scene[:, y : y + settings.crop, x : x + settings.crop]
    return images
