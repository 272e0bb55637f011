"""Stable Diffusion 1.x checkpoints in one `.safetensors` file (LDM layout), read and written without a network.

The configuration is inferred from the tensors' shapes, as ComfyUI does. What no shape shows (the number of attention
heads, the text encoder's activation and special tokens, the latent scale) is kept in the file's metadata under
`concept_ablation.*`; where that is absent the values of Stable Diffusion 1.5 hold. Pipelines are built from a
`SingleFile` elsewhere; module names are in `ldm_names`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import AblationError
from ..files import replacing
from .ldm_names import (
    SD1_LATENT_SCALE,
    UNET_PREFIX,
    Shapes,
    infer_text_config,
    infer_unet_config,
    infer_vae_config,
    inverse,
    other_family,
    rename,
    taesd_names,
    unet_names,
    vae_names,
)

TEXT_PREFIX = "cond_stage_model.transformer.text_model."
VAE_PREFIX = "first_stage_model."
METADATA_PREFIX = "concept_ablation."

_TEXT_PREFIXES = (TEXT_PREFIX, "cond_stage_model.transformer.")
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02")
_VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}

# Metadata name -> configuration name of what the shapes do not show.
_UNET_UNSEEN = {"attention_head_dim": "attention_head_dim", "sample_size": "sample_size"}
_TEXT_UNSEEN = {
    "clip_heads": "num_attention_heads",
    "clip_hidden_act": "hidden_act",
    "clip_bos_token_id": "bos_token_id",
    "clip_eos_token_id": "eos_token_id",
    "clip_pad_token_id": "pad_token_id",
}
_VAE_UNSEEN = {"scaling_factor": "scaling_factor"}

# These choose a precision, a default size or the width of a layer that the text model lacks: the function is the same.
_IMMATERIAL = ("upcast_attention", "force_upcast", "sample_size", "projection_dim")


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint under diffusers' and transformers' names, in the file's dtypes, on the CPU.

    `unet_config`, `text_config` and `vae_config` are keyword arguments of UNet2DConditionModel, CLIPTextConfig and
    the VAE class named `vae_class`. `text` has no `text_model.` prefix (see `fit_text_names`).
    """

    unet_config: dict[str, Any]
    unet: dict[str, Tensor]
    text_config: dict[str, Any]
    text: dict[str, Tensor]
    vae_class: str
    vae_config: dict[str, Any]
    vae: dict[str, Tensor]
    prediction_type: str


@dataclass(frozen=True)
class _Configs:
    unet: dict[str, Any]
    text: dict[str, Any]
    vae_class: str
    vae: dict[str, Any]


def read_single_file(path: Path) -> SingleFile:
    """Read a Stable Diffusion 1.x checkpoint of any depth and width.

    Raises AblationError if the file is missing, is no readable safetensors file, is of another family (SDXL, SD 2,
    SD 3, Flux), or lacks the U-Net, the text encoder, the VAE or a tensor of theirs.
    """
    with _open(path) as file:
        names: list[str] = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        metadata: dict[str, str] = file.metadata() or {}
        _require_sd1(path.name, shapes)
        configs = _infer(path.name, shapes, metadata)
        loaded = {
            key: file.get_tensor(key) for key in shapes if key.startswith((UNET_PREFIX, _TEXT_PREFIXES[-1], VAE_PREFIX))
        }
    vae_config = configs.vae
    if configs.vae_class == "AutoencoderTiny" and METADATA_PREFIX + "scaling_factor" not in metadata:
        comfyui_scale = float(loaded.get(VAE_PREFIX + "vae_scale", SD1_LATENT_SCALE))
        vae_config = vae_config | {"scaling_factor": SD1_LATENT_SCALE / comfyui_scale}
    unet, text, vae = _skeletons(path.name, configs)
    unet_tensors = _diffusers(loaded, UNET_PREFIX, _unet_table(configs.unet))
    _refuse_extra(path.name, unet_tensors, unet)
    vae_tensors = _diffusers(loaded, VAE_PREFIX, _vae_table(configs.vae_class, vae_config))
    return SingleFile(
        unet_config=configs.unet,
        unet=_complete(path.name, unet_tensors, unet.state_dict()),
        text_config=configs.text,
        text=_complete(path.name, _under(loaded, _text_prefix(shapes)), _without_prefix(text.state_dict())),
        vae_class=configs.vae_class,
        vae_config=vae_config,
        vae=_complete(path.name, vae_tensors, vae.state_dict()),
        prediction_type=_prediction_type(shapes, metadata),
    )


def write_single_file(
    path: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL | AutoencoderTiny,
    *,
    dtype: torch.dtype = torch.float16,
    prediction_type: str = "epsilon",
) -> None:
    """Write the three networks as one LDM-layout checkpoint that `read_single_file` and other programs load.

    Raises AblationError if a network has a setting or a tensor that the layout cannot hold, if `prediction_type` is
    neither "epsilon" nor "v_prediction", or if the file cannot be written.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise AblationError(
            f'A single file holds "epsilon" or "v_prediction" models, not "{prediction_type}": '
            "save this model as a diffusers folder instead."
        )
    vae_class = type(vae).__name__
    if vae_class not in _VAE_CLASSES:
        raise _unwritable(f"{vae_class} has no place in its layout")
    if not isinstance(unet.config.layers_per_block, int):
        raise _unwritable("the U-Net has a different number of layers in each block")

    tensors = {
        name: value.detach().to("cpu", dtype).contiguous() if value.dim() else value
        for name, value in ldm_tensors(unet, text_encoder, vae).items()
    }
    if prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    metadata = {
        "format": "pt",
        **_unseen(unet.config, _UNET_UNSEEN),
        **_unseen(text_encoder.config.to_dict(), _TEXT_UNSEEN),
        **_unseen(vae.config, _VAE_UNSEEN),
    }

    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if family := other_family(shapes):
        raise _unwritable(f"the U-Net is that of {family} model")
    configs = _infer(path.name, shapes, metadata)
    _refuse_lost_settings(unet.config, _defaults(UNet2DConditionModel) | configs.unet)
    _refuse_lost_settings(text_encoder.config.to_dict(), configs.text)
    _refuse_lost_settings(vae.config, _defaults(_VAE_CLASSES[vae_class]) | configs.vae)
    _save(path, tensors, metadata)


def ldm_tensors(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL | AutoencoderTiny
) -> dict[str, Tensor]:
    """The three networks' tensors under their names in the LDM layout, sharing their memory."""
    vae_class = type(vae).__name__
    tensors = {
        **_ldm(unet.state_dict(), _unet_table(unet.config), UNET_PREFIX),
        **{TEXT_PREFIX + name: value for name, value in _without_prefix(text_encoder.state_dict()).items()},
        **_ldm(vae.state_dict(), _vae_table(vae_class, vae.config), VAE_PREFIX),
    }
    if vae_class == "AutoencoderTiny":
        # ComfyUI decodes x * vae_scale, x being the denoiser's latents / 0.18215
        tensors[VAE_PREFIX + "vae_scale"] = torch.tensor(SD1_LATENT_SCALE / vae.config.scaling_factor)
        tensors[VAE_PREFIX + "vae_shift"] = torch.tensor(0.0)
    return tensors


def fit_text_names(text: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """`text` under the names that `module` wants: transformers before 5 puts `text_model.` before each."""
    prefixed = any(name.startswith("text_model.") for name in module.state_dict())
    return {f"text_model.{name}" if prefixed else name: value for name, value in text.items()}


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise AblationError(f"{path} is not a file: give the path of a .safetensors checkpoint.")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickled(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(_PICKLE_MAGIC):
            raise _pickled(path) from error
        raise AblationError(
            f"{path.name} is not a readable safetensors file ({error}), perhaps incomplete: download or copy it again."
        ) from error


def _pickled(path: Path) -> AblationError:
    return AblationError(
        f"{path.name} is a pickle, which can run code when it is opened, so it is not read: "
        "convert it to .safetensors first."
    )


def _require_sd1(name: str, shapes: Shapes) -> None:
    if family := other_family(shapes):
        raise AblationError(
            f"{name} is {family} checkpoint, and the only single files read so far are Stable Diffusion 1.x: "
            "pass one of those, or a diffusers folder of a Stable Diffusion 1.x or 2.x model."
        )
    if not any(key.startswith(UNET_PREFIX) for key in shapes):
        raise AblationError(
            f"{name} has no U-Net ({UNET_PREFIX}*), so it is no checkpoint but perhaps a LoRA or a VAE: "
            "pass the checkpoint of a Stable Diffusion 1.x model."
        )
    missing = [] if _text_prefix(shapes) else [f"text encoder ({TEXT_PREFIX}*)"]
    missing += [] if any(key.startswith(VAE_PREFIX) for key in shapes) else [f"VAE ({VAE_PREFIX}*)"]
    if missing:
        raise AblationError(
            f"{name} has no {' and no '.join(missing)}: pass a full checkpoint, not one that was cut down to the U-Net."
        )


def _infer(name: str, shapes: Shapes, metadata: Mapping[str, str]) -> _Configs:
    try:
        unet = infer_unet_config(_under(shapes, UNET_PREFIX))
        text = infer_text_config(_under(shapes, _text_prefix(shapes)))
        vae_class, vae = infer_vae_config(_under(shapes, VAE_PREFIX))
    except KeyError as missing:
        raise _incomplete(name, missing.args[0]) from missing
    except (ValueError, IndexError) as error:
        raise _unknown_structure(name, error) from error
    unet |= _seen(metadata, _UNET_UNSEEN)
    return _Configs(unet, text | _seen(metadata, _TEXT_UNSEEN), vae_class, vae | _seen(metadata, _VAE_UNSEEN))


def _skeletons(name: str, configs: _Configs) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The U-Net, text model and VAE without storage, for the names and shapes that they want."""
    try:
        with torch.device("meta"):
            return (
                UNet2DConditionModel(**configs.unet),
                CLIPTextModel(CLIPTextConfig(**configs.text)),
                _VAE_CLASSES[configs.vae_class](**configs.vae),
            )
    except ValueError as error:
        raise _unknown_structure(name, error) from error


def _seen(metadata: Mapping[str, str], unseen: Mapping[str, str]) -> dict[str, Any]:
    keys = {METADATA_PREFIX + name: field for name, field in unseen.items()}
    return {field: json.loads(metadata[key]) for key, field in keys.items() if key in metadata}


def _unseen(config: Mapping[str, Any], unseen: Mapping[str, str]) -> dict[str, str]:
    return {METADATA_PREFIX + name: json.dumps(config[field]) for name, field in unseen.items()}


def _prediction_type(shapes: Shapes, metadata: Mapping[str, str]) -> str:
    # "v" is what ModelSpec, the metadata standard that trainers write, calls it.
    is_v = "v_pred" in shapes or metadata.get("modelspec.prediction_type") == "v"
    return "v_prediction" if is_v else "epsilon"


def _text_prefix(shapes: Shapes) -> str:
    """The prefix of the CLIP text model's names, or "" when there is none."""
    return next((prefix for prefix in _TEXT_PREFIXES if prefix + "embeddings.token_embedding.weight" in shapes), "")


def _unet_table(config: Mapping[str, Any]) -> dict[str, str]:
    attention = [block == "CrossAttnDownBlock2D" for block in config["down_block_types"]]
    return unet_names(attention, config["layers_per_block"])


def _vae_table(vae_class: str, config: Mapping[str, Any]) -> dict[str, str]:
    if vae_class == "AutoencoderTiny":
        return taesd_names()
    return vae_names(len(config["block_out_channels"]), config["layers_per_block"])


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}


def _without_prefix(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in text.items()}


def _is_vae_attention(name: str) -> bool:
    return ".attentions.0.to_" in name and name.endswith(".weight")


def _diffusers(tensors: Mapping[str, Tensor], prefix: str, table: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under `prefix` with diffusers names; one that `table` lacks keeps its own."""
    renamed = {rename(name, table) or name: value for name, value in _under(tensors, prefix).items()}
    # LDM's VAE attention is 1x1 convolutions, diffusers' is linear.
    return {
        name: value.flatten(1) if _is_vae_attention(name) and value.ndim == 4 else value
        for name, value in renamed.items()
    }


def _ldm(tensors: Mapping[str, Tensor], table: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """diffusers' tensors under LDM names: the opposite of `_diffusers`."""
    ldm_table = inverse(table)
    renamed = {}
    for name, value in tensors.items():
        ldm_name = rename(name, ldm_table)
        if ldm_name is None:
            raise _unwritable(f"its layout has no place for {name}")
        renamed[prefix + ldm_name] = value[:, :, None, None] if _is_vae_attention(name) else value
    return renamed


def _refuse_extra(name: str, tensors: Iterable[str], unet: nn.Module) -> None:
    if extra := sorted(set(tensors) - set(unet.state_dict())):
        raise AblationError(
            f"{name} has a U-Net that is not Stable Diffusion 1.x's (it has {extra[0]}): "
            "pass a Stable Diffusion 1.x checkpoint with plain fp16, bf16 or fp32 weights."
        )


def _complete(name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that are `expected`, all of them and in the expected shapes."""
    for key, value in expected.items():
        if key not in tensors:
            raise _incomplete(name, key)
        if tensors[key].shape != value.shape:
            raise AblationError(
                f"{name} has {key} in the shape {list(tensors[key].shape)} where a Stable Diffusion 1.x model of its "
                f"size has {list(value.shape)}: pass another checkpoint."
            )
    return {key: tensors[key] for key in expected}


def _incomplete(name: str, key: str) -> AblationError:
    return AblationError(f"{name} lacks the tensor {key}: it is not a complete Stable Diffusion 1.x checkpoint.")


def _unknown_structure(name: str, error: Exception) -> AblationError:
    return AblationError(
        f"{name} has a structure that no Stable Diffusion 1.x model has ({error}): pass another checkpoint."
    )


def _unwritable(reason: str) -> AblationError:
    return AblationError(
        f"This model cannot be written as a Stable Diffusion 1.x single file because {reason}: "
        "save it as a diffusers folder instead."
    )


def _defaults(module_class: type[nn.Module]) -> dict[str, Any]:
    parameters = inspect.signature(module_class.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _refuse_lost_settings(config: Mapping[str, Any], read_back: Mapping[str, Any]) -> None:
    for key, value in read_back.items():
        if key not in _IMMATERIAL and json.dumps(config[key]) != json.dumps(value):
            raise _unwritable(f"its {key} is {config[key]} and would be read back as {value}")


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)
