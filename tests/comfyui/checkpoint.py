"""A checkpoint of the Stable Diffusion 1.5 layout with random weights, as small as ComfyUI's detection takes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL
from concept_ablation.core.hosts.single_file import write_single_file


def sd15_parts(seed: int = 0) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """320 and 320 channels, one residual block each: 44 M weights in the U-Net, and a full-size CLIP-L."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(320, 320),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=49408,
        projection_dim=768,
    )
    return unet, CLIPTextModel(text)


def write_sd15(path: Path, seed: int = 0) -> None:
    """The parts and the embedded model's autoencoder as one file, 340 MB in fp16."""
    unet, text_encoder = sd15_parts(seed)
    write_single_file(path, unet, text_encoder, AutoencoderTiny.from_pretrained(EMBEDDED_MODEL, subfolder="vae"))
