"""What ComfyUI calls the layers of a model, which models this package can edit, and whether a delta fits one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..delta import EDITABLE, TEXT_PREFIXES, Delta
from ..errors import AblationError, IncompatibleDelta


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

    known = {
        ldm.removesuffix(".weight"): diffusers.removesuffix(".weight")
        for diffusers, ldm in comfy.utils.unet_to_diffusers(inner.model_config.unet_config).items()
    }
    return {
        "lora_unet_" + known.get(name, name).replace(".", "_"): module
        for name, module in inner.diffusion_model.named_modules()
        if _is_editable(module)
    }


def text_layers(encoder: nn.Module) -> dict[str, nn.Module]:
    """The text encoder's editable layers by the LoRA names that ComfyUI maps."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_clip(encoder, {})
    prefixes = ("lora_te1_", "lora_te2_") if hasattr(encoder, "clip_g") else "lora_te_"
    short = {weight.removesuffix(".weight"): name for name, weight in keys.items() if name.startswith(prefixes)}
    layers = {}
    for name, module in encoder.named_modules():
        if _is_editable(module):
            layers[short.get(name, "text_encoders." + name)] = module
    return layers


def _is_editable(module: nn.Module) -> bool:
    return isinstance(module, EDITABLE) and getattr(module, "weight", None) is not None


def check_fits(delta: Delta, keys: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Raise IncompatibleDelta unless ComfyUI would apply every part of the delta.

    Args:
        keys: the weight that each LoRA name stands for.
        weights: all weights of the model and, where there is one, of the CLIP.
    """
    made_for = delta.metadata.get("concept_ablation.base_model", "another model")
    missing = [name for name in delta.layers if name not in keys]
    if missing:
        text_only = all(name.startswith(TEXT_PREFIXES) for name in missing)
        advice = "connect the CLIP of its model" if text_only else f"use it with the model it was made for ({made_for})"
        raise IncompatibleDelta(
            f"The delta edits {len(missing)} layers that this model does not have, first {missing[0]}: {advice}."
        )
    for name, layer in delta.layers.items():
        weight = weights[keys[name]]
        bias = weights.get(keys[name].removesuffix(".weight") + ".bias")
        for change, parameter in ((layer.weight, weight), (layer.bias, bias)):
            have = None if parameter is None else tuple(parameter.shape)
            if change is not None and (have is None or not _same_matrix(tuple(change.shape), have)):
                raise IncompatibleDelta(
                    f"The delta's {name} has the shape {tuple(change.shape)} but the model has {have}: "
                    f"use it with the model it was made for ({made_for})."
                )


def _same_matrix(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether the shapes agree; a 1x1 convolution and the linear layer that does the same count as equal."""

    def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if shape[2:] == (1, 1) else shape

    return trimmed(change) == trimmed(weight)
