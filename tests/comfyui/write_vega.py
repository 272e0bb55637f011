"""Write a checkpoint of the SDXL family with random weights: Segmind-Vega's layout, the smallest that stock detection
takes (745 M weights in the U-Net, CLIP-L and CLIP-G; 3.5 GB in fp16).

Run with ComfyUI's modules on the path, whose own writer makes the file: python write_vega.py FILE
"""

from __future__ import annotations

import sys

import torch
from comfy.cli_args import args

args.cpu = True

import comfy.sd  # noqa: E402
from comfy import model_base, supported_models  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

UNET = {
    **supported_models.Segmind_Vega.unet_config,
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": -1,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "dtype": torch.float16,
}


@torch.inference_mode()
def main(path: str) -> None:
    """Make the parts, fill them with small random numbers, and save them as Save Checkpoint does."""
    cpu = torch.device("cpu")
    config = supported_models.Segmind_Vega(UNET)
    model = ModelPatcher(model_base.SDXL(config, device=cpu), load_device=cpu, offload_device=cpu)
    clip = comfy.sd.CLIP(config.clip_target())
    rng = torch.Generator().manual_seed(0)
    for module in (model.model.diffusion_model, clip.cond_stage_model):
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                # norms and biases as at the start of a training
                is_gain = name.endswith(("weight", "logit_scale"))
                tensor.fill_(1.0 if is_gain else 0.0)
            else:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=rng))
    vae = comfy.sd.VAE(sd=autoencoder())
    comfy.sd.save_checkpoint(path, model, clip, vae)


def autoencoder() -> dict[str, torch.Tensor]:
    """The embedded model's, under TAESD's names."""
    from diffusers import AutoencoderTiny

    from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL
    from concept_ablation.core.hosts.ldm_names import inverse, rename, taesd_names

    vae = AutoencoderTiny.from_pretrained(EMBEDDED_MODEL, subfolder="vae")
    table = inverse(taesd_names())
    renamed = {rename(name, table): tensor for name, tensor in vae.state_dict().items()}
    return {str(name): tensor.float() for name, tensor in renamed.items()}


if __name__ == "__main__":
    main(sys.argv[1])
