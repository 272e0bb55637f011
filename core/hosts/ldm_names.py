"""Stable Diffusion's original (LDM) layout: which module is which in diffusers, and what its shapes say.

Each table maps LDM module names to diffusers module names; `rename` applies one to a tensor name, and `inverse` turns
it round, so that reading and writing share one source. The `infer_…` functions give the configuration that a set of
shapes implies. Files, metadata and errors for the user belong to `single_file`.

Sources: CompVis/stable-diffusion (`openaimodel.UNetModel`, `model.Encoder` and `Decoder`), madebyollin/taesd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
UNET_PREFIX = "model.diffusion_model."
SD1_LATENT_SCALE = 0.18215

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_TAESD_ENCODER_LAYERS = 15
_TAESD_DECODER_LAYERS = 19


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """The tensor name with its module renamed by `table`, or None when no entry covers it."""
    module = name
    while module not in table:
        module = module.rpartition(".")[0]
        if not module:
            return None
    return table[module] + name[len(module) :]


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The same table read from diffusers to LDM."""
    return {diffusers: ldm for ldm, diffusers in table.items()}


def unet_names(attention: Sequence[bool], layers_per_block: int) -> dict[str, str]:
    """LDM to diffusers modules of a U-Net, without the `model.diffusion_model.` prefix.

    `attention` says for each resolution, finest first, whether its blocks have a transformer; the way up mirrors it.
    """
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **_parts("middle_block.0", "mid_block.resnets.0", _UNET_RESNET),
        **_parts("middle_block.2", "mid_block.resnets.1", _UNET_RESNET),
    }
    last = len(attention) - 1
    for level, attends in enumerate(attention):
        start = 1 + level * (layers_per_block + 1)
        for layer in range(layers_per_block):
            ldm, block = f"input_blocks.{start + layer}", f"down_blocks.{level}"
            table |= _parts(f"{ldm}.0", f"{block}.resnets.{layer}", _UNET_RESNET)
            if attends:
                table[f"{ldm}.1"] = f"{block}.attentions.{layer}"
        if level < last:
            table[f"input_blocks.{start + layers_per_block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, attends in enumerate(reversed(attention)):
        start = level * (layers_per_block + 1)
        for layer in range(layers_per_block + 1):
            ldm, block = f"output_blocks.{start + layer}", f"up_blocks.{level}"
            table |= _parts(f"{ldm}.0", f"{block}.resnets.{layer}", _UNET_RESNET)
            if attends:
                table[f"{ldm}.1"] = f"{block}.attentions.{layer}"
        if level < last:
            position = 2 if attends else 1
            ldm = f"output_blocks.{start + layers_per_block}.{position}.conv"
            table[ldm] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def vae_names(levels: int, layers_per_block: int) -> dict[str, str]:
    """LDM to diffusers modules of an AutoencoderKL, without the `first_stage_model.` prefix.

    LDM numbers the decoder's levels by resolution, diffusers by order of execution, hence the reversal.
    """
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        table |= _parts(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET)
        table |= _parts(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        table |= _parts(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers_per_block):
            table |= _parts(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
        for layer in range(layers_per_block + 1):
            table |= _parts(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
        if level < levels - 1:
            table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return table


def taesd_names() -> dict[str, str]:
    """TAESD to diffusers modules (AutoencoderTiny), without the `first_stage_model.` prefix.

    TAESD's decoder begins with a Clamp module, which diffusers has in `forward`, so its numbers are one higher.
    """
    encoder = {f"taesd_encoder.{layer}": f"encoder.layers.{layer}" for layer in range(_TAESD_ENCODER_LAYERS)}
    decoder = {f"taesd_decoder.{layer + 1}": f"decoder.layers.{layer}" for layer in range(_TAESD_DECODER_LAYERS)}
    return encoder | decoder


def infer_unet_config(shapes: Shapes) -> dict[str, Any]:
    """UNet2DConditionModel arguments from the shapes of LDM names without prefix. KeyError: the named one is missing.

    `attention_head_dim` is diffusers' historical name for the number of heads, 8 in Stable Diffusion 1.
    """
    levels: list[list[int]] = [[]]
    for index in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(index)
    first = [level[0] if level else index for index, level in enumerate(levels)]
    attention = [f"input_blocks.{index}.1.proj_in.weight" in shapes for index in first]
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    return {
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0] for index in first],
        "layers_per_block": len(levels[0]),
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": 8,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }


def infer_text_config(shapes: Shapes) -> dict[str, Any]:
    """CLIPTextConfig arguments from the shapes of a CLIP text model without prefix, with CLIP-L's 64-wide heads."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }


def infer_vae_config(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of the VAE from the shapes of LDM or TAESD names without prefix."""
    if "taesd_decoder.1.weight" in shapes:
        return "AutoencoderTiny", {"latent_channels": shapes["taesd_decoder.1.weight"][1], "scaling_factor": 1.0}
    levels = _count(shapes, "encoder.down.")
    return "AutoencoderKL", {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": SD1_LATENT_SCALE,
        "sample_size": 512,
    }


def other_family(shapes: Shapes) -> str | None:
    """The model family, with its article, of a checkpoint that is not Stable Diffusion 1.x; None if it may be."""
    if any("double_blocks." in key for key in shapes):
        return "a Flux"
    if any("joint_blocks." in key for key in shapes):
        return "a Stable Diffusion 3"
    if any(key.startswith("conditioner.embedders.") for key in shapes):
        return "an SDXL"
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        return "a Stable Diffusion 2"
    context_dims = {
        shape[1] for key, shape in shapes.items() if key.startswith(UNET_PREFIX) and key.endswith(".attn2.to_k.weight")
    }
    if context_dims & {1280, 2048}:
        return "an SDXL"
    return "a Stable Diffusion 2" if 1024 in context_dims else None


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules follow `prefix` (0 up to the highest number present)."""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)]
    return max(numbers, default=-1) + 1


def _parts(ldm: str, diffusers: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ldm}.{old}": f"{diffusers}.{new}" for old, new in parts.items()}
