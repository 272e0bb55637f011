"""Emoji Diffusion, the model that comes with this package, as ComfyUI's own MODEL, CLIP and VAE.

Stock detection knows no U-Net that narrow, so its configuration is made here from the folder's; the classes, the model
management and everything after loading are ComfyUI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .comfyui import HINTS, Hints
from .diffusers import EMBEDDED_MODEL, load_hints, load_parts
from .single_file import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, ldm_tensors

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_NAME = "Emoji Diffusion"
_TEXT_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class _Multiple:
    """A level's width, where ComfyUI has a factor for the first level's: it need not be a whole multiple of that."""

    width: int

    def __mul__(self, first: int) -> int:
        return self.width

    __rmul__ = __mul__


def load_emoji_diffusion(folder: Path = EMBEDDED_MODEL) -> tuple[ModelPatcher, CLIP, VAE]:
    """The embedded model, or another diffusers folder of its kind, in fp32 and under ComfyUI's model management.

    Raises:
        AblationError: the folder is incomplete or damaged.
    """
    import comfy.sd
    from comfy import model_management, supported_models
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    parts = load_parts(folder)
    tensors = ldm_tensors(parts.unet, parts.text_encoder, parts.vae)
    config = supported_models.SD15(_unet_config(parts.unet.config))
    config.unet_config["num_heads"] = parts.unet.config.attention_head_dim
    config.set_inference_dtype(torch.float32, None)

    vae = comfy.sd.VAE(sd=_under(tensors, VAE_PREFIX))
    config.latent_format.latent_rgb_factors, config.latent_format.latent_rgb_factors_bias = _preview_factors(
        vae, config.latent_format
    )
    config.latent_format.taesd_decoder_name = None
    inner = BaseModel(config)
    inner.load_model_weights(_under(tensors, UNET_PREFIX))
    hints = load_hints(folder)
    model = ModelPatcher(
        inner, load_device=model_management.get_torch_device(), offload_device=model_management.unet_offload_device()
    )
    edge = 8 * parts.unet.config.sample_size
    rates = hints.learning_rate_scale, hints.learning_rate_scales
    model.set_attachments(HINTS, Hints(_NAME, hints.prompt_source, rates[0], edge, hints.vocabulary, rates[1]))

    text = _under(tensors, TEXT_PREFIX)
    own = {name: getattr(parts.text_encoder.config, name) for name in _TEXT_SETTINGS}
    clip = comfy.sd.CLIP(
        config.clip_target(),
        parameters=sum(tensor.numel() for tensor in text.values()),
        model_options={"clip_l_model_config": own, "dtype": torch.float32},
    )
    clip.load_sd({f"clip_l.transformer.text_model.{name}": tensor for name, tensor in text.items()}, full_model=True)
    return model, clip, vae


def _unet_config(config: Any) -> dict[str, Any]:
    """The arguments of ComfyUI's UNetModel for a diffusers configuration."""
    attends = [1 if kind.startswith("CrossAttn") else 0 for kind in config.down_block_types]
    layers = config.layers_per_block
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.block_out_channels[0],
        "channel_mult": [_Multiple(width) for width in config.block_out_channels],
        "num_res_blocks": [layers] * len(attends),
        "transformer_depth": [depth for depth in attends for _ in range(layers)],
        "transformer_depth_output": [depth for depth in attends for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.use_linear_projection,
        "context_dim": config.cross_attention_dim,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _preview_factors(vae: VAE, latent_format: Any) -> tuple[list[list[float]], list[float]]:
    """The linear map from this autoencoder's latents to colours that fits best, for previews.

    Fitted to smooth random latents, as those of pictures are, and the mean colour of what each cell of them decodes to.

    Returns:
        Factors [4][3] and bias [3], for colours in [-1, 1].
    """
    cells = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    # as wide as latents are, which averaging between cells narrows
    latents = 1.3 * F.interpolate(cells, scale_factor=4, mode="bilinear")
    images = vae.decode(latent_format.process_out(latents)).float().cpu().permute(0, 3, 1, 2)
    colours = F.avg_pool2d(images, 8).permute(0, 2, 3, 1).reshape(-1, 3) * 2 - 1
    known = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    fitted = torch.linalg.lstsq(torch.cat((known, torch.ones(len(known), 1)), dim=1), colours).solution
    return fitted[:-1].tolist(), fitted[-1].tolist()
