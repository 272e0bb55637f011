"""What ComfyUI calls the layers of a model, and which models this package can edit."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import AblationError
from . import ldm_patcher


def architecture_of(inner: Any) -> str:
    """The architecture of a ComfyUI model: "sd1", "sd2" or "sdxl".

    Raises:
        AblationError: another one, or a variant with further inputs (inpainting, unCLIP, the XL refiner).
    """
    from comfy import model_base, supported_models

    config = inner.model_config
    families = (("sd1", supported_models.SD15), ("sd2", supported_models.SD20), ("sdxl", supported_models.SDXL))
    found = next((name for name, family in families if isinstance(config, family)), None)
    plain = type(inner) in (model_base.BaseModel, model_base.SDXL) and not inner.concat_keys
    if found is None or not plain or config.unet_config.get("in_channels") != 4:
        raise AblationError(
            f"The model is a {type(config).__name__} ({type(inner).__name__}): connect a Stable Diffusion 1.x, 2.x or "
            "XL base model, not an inpainting, refiner or other variant."
        )
    return found


def unet_layers(inner: Any) -> dict[str, nn.Module]:
    """The network's editable layers by LoRA name: diffusers' names where they exist, else ComfyUI's own."""
    import comfy.utils

    to_ldm = comfy.utils.unet_to_diffusers(inner.model_config.unet_config)
    return ldm_patcher.unet_layers(inner.diffusion_model, to_ldm)


def text_layers(encoder: nn.Module) -> dict[str, nn.Module]:
    """The text encoder's editable layers by the LoRA names that ComfyUI maps."""
    import comfy.lora

    short = ldm_patcher.short_text_names(encoder, comfy.lora.model_lora_keys_clip(encoder, {}))
    return {
        short.get(name, "text_encoders." + name): module
        for name, module in encoder.named_modules()
        if ldm_patcher.is_editable(module)
    }
