"""Drawn shapes in place of icon sets, and a run of the embedded model's tools small enough for tests, and its loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import autoencoder
import denoiser
import judge
import latents
import memorized
import numpy as np
import pictures
import settings
import stage
import torch

SIZE = 32
STYLES = ("noto", "flat")
CONCEPTS = tuple(
    pictures.Concept(name, category, "shapes")
    for name, category in (("disc", "round thing"), ("ring", "round thing"), ("box", "square"), ("owl", "bird"))
)
SCENE = memorized.Scene(
    "The last disc", ("a disc",), (("disc", "noto"), ("box", "noto"), ("owl", "flat")), (9, 9, 9), (200, 9, 9), "disc"
)


def shapes() -> pictures.Pictures:
    """Four simple shapes in two styles (reddish and bluish), cut out."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    masks = (radius < 0.8, (radius < 0.8) & (radius > 0.4), x.abs().maximum(y.abs()) < 0.6, (y > x.abs() - 0.5))
    found = []
    for style in range(2):
        for mask in masks:
            colour = torch.tensor([220, 60, 40] if style == 0 else [40, 60, 220], dtype=torch.uint8)
            rgb = colour.view(3, 1, 1).expand(3, SIZE, SIZE)
            found.append(torch.cat((rgb, mask[None] * torch.tensor(255, dtype=torch.uint8))).to(torch.uint8))
    concept = torch.arange(4).repeat(2)
    return pictures.Pictures(
        torch.stack(found), concept, torch.arange(2).repeat_interleave(4), CONCEPTS, STYLES, ({}, {})
    )


def strangers() -> pictures.Pictures:
    """The same shapes under other names."""
    own = shapes()
    return replace(own, concepts=tuple(pictures.Concept(f"other {one.name}", one.name, "shapes") for one in CONCEPTS))


def tiny(batch: int = 8) -> settings.Settings:
    """A run of a few thousand weights on 32 px pictures."""

    def rate(value: float) -> settings.Optimization:
        return settings.Optimization(batch, value, warmup=5, ema=0.9)

    def tower(seed: int) -> settings.Tower:
        return settings.Tower("test_resnet", seed, 16, 64, 1, 32, rate(2e-3))

    return settings.Settings(
        image_size=SIZE,
        scenes=(SCENE,),
        autoencoder={
            "encoder_block_out_channels": (16, 16, 16),
            "decoder_block_out_channels": (16, 16, 16),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
        },
        crop=24,
        autoencoder_optimization=rate(5e-3),
        latent_rounds=3,
        channels=(32, 32),
        heads=2,
        text_width=32,
        text_layers=1,
        denoiser_optimization=rate(3e-3),
        judge=tower(1),
        validation_judge=tower(2),
    )


def average_loss(loss: stage.Loss, model: torch.nn.Module) -> float:
    """Over the same few batches whatever the model."""
    rng = torch.Generator().manual_seed(123)
    with torch.no_grad():
        return float(np.mean([loss(model.eval(), rng).item() for _ in range(6)]))


def remaining_loss(
    out: Path, parts: settings.Settings, own: pictures.Pictures, others: pictures.Pictures
) -> dict[str, float]:
    """What the training in `out` has left of the loss that each stage begins with, as a share."""
    found = latents.load_latents(out / "latents")
    stages = {
        "autoencoder": (autoencoder.build(parts), autoencoder.reconstruction_loss(own, parts)),
        "denoiser": (denoiser.build(parts, found), denoiser.noise_loss(own, found, parts)),
        "judge": (judge.build(parts.judge), judge.judge_loss(own, others, parts, parts.judge)),
        "validation_judge": (
            judge.build(parts.validation_judge),
            judge.judge_loss(own, others, parts, parts.validation_judge),
        ),
    }
    shares = {}
    for name, (model, loss) in stages.items():
        before = average_loss(loss, model)
        shares[name] = average_loss(loss, stage.load_average(model, out / name)) / before
    return shares
