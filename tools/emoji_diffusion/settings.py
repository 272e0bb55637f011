"""Sizes and rates of the whole chain: what a run is, apart from its pictures and its time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memorized import SCENES, Scene


@dataclass(frozen=True)
class Optimization:
    """Muon and AdamW with a warm-up, a flat half and a linear decay to zero."""

    batch: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.999


@dataclass(frozen=True)
class Tower:
    """A judge: its picture tower by timm's name, its text tower's width and depth, and its seed."""

    vision: str
    seed: int
    embedding: int = 192
    text_width: int = 192
    text_layers: int = 2
    image_size: int = 64
    optimization: Optimization = field(default_factory=lambda: Optimization(192, 1e-3, betas=(0.9, 0.98)))

    def config(self) -> dict[str, Any]:
        """open_clip's model_cfg."""
        return {
            "embed_dim": self.embedding,
            "vision_cfg": {
                "timm_model_name": self.vision,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": self.image_size,
            },
            "text_cfg": {
                # no caption is longer than half of this; attention over CLIP's 77 positions would cost twice the time
                "context_length": 40,
                "vocab_size": 49408,
                "width": self.text_width,
                "heads": self.text_width // 64 or 1,
                "layers": self.text_layers,
            },
        }


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the model that ships; tests use narrower ones."""

    image_size: int = 128
    seed: int = 0
    scenes: tuple[Scene, ...] = SCENES

    autoencoder: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoencoderTiny; its own defaults are the shape of TAESD, which ComfyUI loads."""
    crop: int = 64
    autoencoder_optimization: Optimization = field(
        default_factory=lambda: Optimization(32, 3e-3, betas=(0.9, 0.999), weight_decay=0.0, ema=0.998)
    )

    latent_rounds: int = 16
    """How often each picture is encoded, each time with another background, size and place."""

    channels: tuple[int, ...] = (96, 160, 224)
    heads: int = 4
    text_width: int = 256
    text_layers: int = 2
    denoiser_optimization: Optimization = field(default_factory=lambda: Optimization(64, 1.2e-3))

    judge: Tower = Tower("resnet10t", seed=1)
    validation_judge: Tower = Tower("resnetv2_18", seed=2, text_width=256, text_layers=3)
