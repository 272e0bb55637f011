"""A checkpoint of the Stable Diffusion 1.5 layout with random weights, as small as Forge's detection takes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from concept_ablation.core.hosts.single_file import write_single_file
from concept_ablation.tests.comfyui.checkpoint import sd15_parts


def write_forge_sd15(path: Path, seed: int = 0) -> None:
    """A U-Net of 44 M weights to which prompts matter; text encoder and autoencoder have the size that Forge expects.

    500 MB in fp16.
    """
    unet, text_encoder = sd15_parts(seed)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_k" in name or "attn2.to_v" in name:
                weight.mul_(8)
        for name, weight in text_encoder.named_parameters():
            if name.endswith("final_layer_norm.bias"):
                # as in trained models: Forge divides by the mean of the conditioning
                weight.fill_(0.1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    write_single_file(path, unet, text_encoder, vae)
