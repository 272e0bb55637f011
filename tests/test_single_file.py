"""Single-file checkpoints: round trips of real and random models, diffusers' own converters as judge, every error."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.single_file import fit_text_names, read_single_file, write_single_file

EMOJI = Path(__file__).parents[1] / "assets" / "emoji_diffusion"
# the fields of CompVis' v1-inference.yaml that diffusers asks for, with narrow channels
SD1_STRUCTURE = json.loads("""{"model": {"params": {
    "scale_factor": 0.18215,
    "unet_config": {"params": {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "transformer_depth": 1, "context_dim": 64
    }},
    "first_stage_config": {"params": {"ddconfig": {
        "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2
    }}}
}}}""")
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."
TWO_LEVELS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.fixture(scope="module")
def emoji():
    return (
        UNet2DConditionModel.from_pretrained(EMOJI, subfolder="unet").float().eval(),
        CLIPTextModel.from_pretrained(EMOJI, subfolder="text_encoder").float().eval(),
        AutoencoderTiny.from_pretrained(EMOJI, subfolder="vae").float().eval(),
    )


@pytest.fixture(scope="module")
def emoji_file(emoji, tmp_path_factory):
    path = tmp_path_factory.mktemp("emoji") / "emoji.safetensors"
    write_single_file(path, *emoji)
    assert list(path.parent.iterdir()) == [path]
    return path


@pytest.fixture(scope="module")
def small():
    """A random model with the structure of Stable Diffusion 1.x: four levels, two layers each, attention in three."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=64)
    config = CLIPTextConfig(vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    config.num_attention_heads, config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 118, 119, 119
    text = CLIPTextModel(config)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, **blocks)
    for parameter in (*unet.parameters(), *text.parameters(), *vae.parameters()):
        parameter.data += 0.01 * torch.randn_like(parameter)  # norms begin alike, and a swap of them must show
    return unet.eval(), text.eval(), vae.eval()


@pytest.fixture(scope="module")
def small_file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_single_file(path, *small, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def small_tensors(small_file):
    return load_file(small_file)


def assert_same_tensors(actual, expected, dtype):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        assert torch.equal(actual[name], value.to(dtype)), name


def built(file):
    """The three networks made from nothing but what was read, in fp32."""
    unet = UNet2DConditionModel(**file.unet_config)
    text = CLIPTextModel(CLIPTextConfig(**file.text_config))
    vae = getattr(diffusers, file.vae_class)(**file.vae_config)
    unet.load_state_dict(file.unet)
    text.load_state_dict(fit_text_names(file.text, text))
    vae.load_state_dict(file.vae)
    return unet.float().eval(), text.float().eval(), vae.float().eval()


@torch.no_grad()
def outputs(unet, text, vae, tokens):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    image = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    hidden = text(tokens)
    encoded = vae.encode(image)
    return {
        "noise": unet(latents, torch.tensor([417]), hidden.last_hidden_state).sample,
        "hidden": hidden.last_hidden_state,
        "pooled": hidden.pooler_output,
        "decoded": vae.decode(latents / vae.config.scaling_factor).sample,
        "encoded": encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean,
    }


def assert_refused(tensors, folder, message):
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(AblationError, match=message):
        read_single_file(folder / "model.safetensors")


def assert_same_outputs(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_the_embedded_model_comes_back_as_it_went(emoji, emoji_file):
    file = read_single_file(emoji_file)

    for part, tensors in zip(emoji, (file.unet, file.text, file.vae), strict=True):
        assert_same_tensors(tensors, part.state_dict(), torch.float16)
    tokens = torch.tensor([[49406, 320, 1125, 539, 49407] + [49407] * 72])
    assert_same_outputs(outputs(*built(file), tokens), outputs(*emoji, tokens))


def test_the_embedded_models_configuration_comes_back(emoji, emoji_file):
    file = read_single_file(emoji_file)

    assert file.unet_config["attention_head_dim"] == 4
    assert file.unet_config["sample_size"] == 16
    for part, config in zip(emoji, (file.unet_config, file.text_config, file.vae_config), strict=True):
        original = json.loads(json.dumps({key: getattr(part.config, key) for key in config}))
        assert original == config
    assert (file.vae_class, file.prediction_type) == ("AutoencoderTiny", "epsilon")
    assert file.vae_config["scaling_factor"] == emoji[2].config.scaling_factor


def test_taesd_is_numbered_as_in_its_own_code(emoji, emoji_file):
    """The decoder of madebyollin/taesd, whose first module is a clamp, takes the file's tensors as they are."""

    class Clamp(nn.Module):
        def forward(self, x):
            return torch.tanh(x / 3) * 3

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            convs = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

        def forward(self, x):
            return torch.relu(self.conv(x) + x)

    layers = [Clamp(), nn.Conv2d(4, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    decoder = nn.Sequential(*layers, Block(), nn.Conv2d(64, 3, 3, padding=1))
    prefix = f"{VAE}taesd_decoder."
    tensors = load_file(emoji_file)
    decoder.load_state_dict({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    vae = emoji[2]
    denoiser_latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    with torch.no_grad():
        # ComfyUI divides by SD1's 0.18215 and then multiplies by vae_scale.
        raw = decoder(denoiser_latents / 0.18215 * tensors["first_stage_model.vae_scale"])
        expected = vae.decode(denoiser_latents / vae.config.scaling_factor).sample

    torch.testing.assert_close(raw.mul(2).sub(1), expected, rtol=1e-4, atol=1e-4)


def test_taesd_scale_comes_from_its_tensor_without_our_metadata(emoji_file, tmp_path):
    path = tmp_path / "stripped.safetensors"
    save_file(load_file(emoji_file), path)

    file = read_single_file(path)

    scale = AutoencoderTiny.load_config(EMOJI / "vae")["scaling_factor"]
    assert file.vae_config["scaling_factor"] == pytest.approx(scale, rel=1e-6)
    assert file.unet_config["attention_head_dim"] == 8
    assert file.text_config["num_attention_heads"] == 256 // 64


def test_sd1_structure_round_trip(small, small_file):
    file = read_single_file(small_file)

    for part, tensors in zip(small, (file.unet, file.text, file.vae), strict=True):
        assert_same_tensors(tensors, part.state_dict(), torch.float32)
    tokens = torch.tensor([[118, 5, 77, 119, 119]])
    assert_same_outputs(outputs(*built(file), tokens), outputs(*small, tokens))
    assert (file.vae_class, file.vae_config["scaling_factor"]) == ("AutoencoderKL", 0.18215)


def test_diffusers_converters_read_the_same(small_tensors, small_file):
    """diffusers renames by rules of its own; it must find the same tensors under the same names."""
    file = read_single_file(small_file)
    unet_config = converters.create_unet_diffusers_config_from_ldm(SD1_STRUCTURE, small_tensors)
    vae_config = converters.create_vae_diffusers_config_from_ldm(SD1_STRUCTURE, small_tensors)
    unet = converters.convert_ldm_unet_checkpoint(dict(small_tensors), unet_config)
    vae = converters.convert_ldm_vae_checkpoint(dict(small_tensors), vae_config)
    text = converters.convert_ldm_clip_checkpoint(dict(small_tensors))

    assert_same_tensors(file.unet, unet, torch.float32)
    assert_same_tensors(file.vae, vae, torch.float32)
    assert_same_tensors({f"text_model.{key}": value for key, value in file.text.items()}, text, torch.float32)
    # sample_size depends on which files diffusers takes for 768-pixel models; the rest is structure.
    for ours, theirs in ((file.unet_config, unet_config), (file.vae_config, vae_config)):
        shared = (set(ours) & set(theirs)) - {"sample_size"}
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
        assert {"block_out_channels", "layers_per_block", "down_block_types", "up_block_types"} <= shared


def test_names_and_shapes_are_those_of_stable_diffusion(small_tensors):
    """Spot checks against the key list of v1-5-pruned.safetensors (narrower here)."""
    shapes = {
        f"{UNET}time_embed.2.weight": [128, 128],
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [32, 64],
        f"{UNET}input_blocks.3.0.op.weight": [32, 32, 3, 3],
        f"{UNET}input_blocks.4.0.skip_connection.weight": [64, 32, 1, 1],
        f"{UNET}middle_block.1.proj_in.weight": [128, 128, 1, 1],
        f"{UNET}output_blocks.2.1.conv.weight": [128, 128, 3, 3],
        f"{UNET}output_blocks.5.2.conv.weight": [128, 128, 3, 3],
        f"{UNET}out.2.weight": [4, 32, 3, 3],
        f"{VAE}encoder.mid.attn_1.q.weight": [128, 128, 1, 1],
        f"{VAE}decoder.up.1.block.0.nin_shortcut.weight": [64, 128, 1, 1],
        f"{VAE}decoder.up.3.upsample.conv.weight": [128, 128, 3, 3],
        f"{VAE}quant_conv.weight": [8, 8, 1, 1],
        f"{TEXT}encoder.layers.2.mlp.fc1.weight": [96, 64],
    }
    assert {name: list(small_tensors[name].shape) for name in shapes} == shapes
    assert f"{UNET}output_blocks.11.2.conv.weight" not in small_tensors


def test_foreign_tensors_and_old_text_names_are_accepted(small_tensors, small_file, tmp_path):
    old = {name.replace(".text_model.", "."): value for name, value in small_tensors.items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    old["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    old["first_stage_model.loss.logvar"] = torch.tensor(0.0)
    save_file(old, tmp_path / "old.safetensors")

    file, reference = read_single_file(tmp_path / "old.safetensors"), read_single_file(small_file)

    for part in ("unet", "text", "vae"):
        assert_same_tensors(getattr(file, part), getattr(reference, part), torch.float32)


def test_linear_projections_and_an_inpainting_input_are_inferred(small, tmp_path):
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**TWO_LEVELS, in_channels=9, use_linear_projection=True)
    write_single_file(tmp_path / "linear.safetensors", unet, *small[1:], dtype=torch.float32)

    file = read_single_file(tmp_path / "linear.safetensors")

    assert file.unet_config["use_linear_projection"] is True
    assert file.unet_config["in_channels"] == 9
    assert file.unet_config["down_block_types"] == ["CrossAttnDownBlock2D", "DownBlock2D"]
    assert_same_tensors(file.unet, unet.state_dict(), torch.float32)


def test_what_no_shape_shows_is_kept(small, tmp_path):
    unet, text, vae = small
    config = CLIPTextConfig(**{**text.config.to_dict(), "num_attention_heads": 4, "hidden_act": "gelu"})
    path = tmp_path / "gelu.safetensors"
    write_single_file(path, unet, CLIPTextModel(config), vae)

    file = read_single_file(path)

    assert (file.text_config["num_attention_heads"], file.text_config["hidden_act"]) == (4, "gelu")
    assert (file.text_config["eos_token_id"], file.text_config["bos_token_id"]) == (119, 118)
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["concept_ablation.attention_head_dim"] == "8"
        assert opened.metadata()["concept_ablation.clip_heads"] == "4"


@pytest.mark.parametrize("marker", ["ours", "tensor", "modelspec"])
def test_v_prediction(marker, small, small_tensors, tmp_path):
    path = tmp_path / "v.safetensors"
    if marker == "ours":
        write_single_file(path, *small, prediction_type="v_prediction")
        assert "v_pred" in load_file(path)
    elif marker == "tensor":
        save_file({**small_tensors, "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    else:
        save_file(small_tensors, path, metadata={"modelspec.prediction_type": "v"})

    assert read_single_file(path).prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "renamed.safetensors"])
def test_pickles_are_refused(name, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(AblationError, match=r"is a pickle.*convert it to \.safetensors"):
        read_single_file(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_missing_and_truncated_file(kept, small_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    with pytest.raises(AblationError, match=r"cut\.safetensors is not a file"):
        read_single_file(path)
    path.write_bytes(small_file.read_bytes()[:kept])
    with pytest.raises(AblationError, match=r"cut\.safetensors is not a readable safetensors file.*download"):
        read_single_file(path)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("an SDXL", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", [8]),
        ("an SDXL", f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", [4, 2048]),
        ("a Stable Diffusion 2", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", [4, 1024]),
        ("a Stable Diffusion 2", "cond_stage_model.model.ln_final.weight", [8]),
        ("a Stable Diffusion 3", f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", [8, 8]),
        ("a Flux", "double_blocks.0.img_attn.qkv.weight", [8, 8]),
    ],
)
def test_other_families(family, name, shape, tmp_path):
    message = rf"model\.safetensors is {family} checkpoint.*1\.x or 2\.x"
    assert_refused({name: torch.zeros(shape)}, tmp_path, message)


def test_a_lora_is_no_checkpoint(tmp_path):
    tensors = {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.zeros(4, 2)}
    assert_refused(tensors, tmp_path, r"model\.safetensors has no U-Net")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (("cond_stage_model.",), "has no text encoder"),
        ((VAE,), "has no VAE"),
        (("cond_stage_model.", VAE), "has no text encoder .* and no VAE"),
        ((f"{UNET}middle_block.1.proj_in.weight",), "lacks the tensor middle_block.1.proj_in.weight"),
        ((f"{UNET}output_blocks.7.0.in_layers.2.bias",), r"lacks the tensor up_blocks\.2\.resnets\.1\.conv1\.bias"),
        ((f"{UNET}input_blocks.2.",), r"lacks the tensor down_blocks\.0\.attentions\.1"),
        ((f"{VAE}decoder.up.2.block.0.conv1.weight",), r"lacks the tensor decoder\.up_blocks\.1"),
        ((f"{TEXT}final_layer_norm.bias",), "lacks the tensor final_layer_norm.bias"),
    ],
)
def test_missing_parts(lost, message, small_tensors, tmp_path):
    kept = {name: value for name, value in small_tensors.items() if not name.startswith(lost)}
    assert_refused(kept, tmp_path, message)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{UNET}label_emb.0.0.weight", [4, 4], r"not Stable Diffusion 1\.x's \(it has label_emb\.0\.0\.weight\)"),
        (f"{UNET}time_embed.2.bias", [5], r"time_embedding\.linear_2\.bias in the shape \[5\].*\[128\]"),
        (f"{TEXT}embeddings.token_embedding.weight", [5], "structure that no Stable Diffusion"),
    ],
)
def test_unknown_and_misshapen_tensors(name, shape, message, small_tensors, tmp_path):
    assert_refused({**small_tensors, name: torch.zeros(shape)}, tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups is 16 and would be read back as 32"),
        ({"cross_attention_dim": 1024}, "a Stable Diffusion 2 model"),
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block is 2"),
        ({"layers_per_block": (1, 2)}, "different number of layers"),
        ({"class_embed_type": "timestep"}, "no place for class_embedding"),
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_refused(changes, message, small, tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TWO_LEVELS | changes)
    unet = unet.to_empty(device="cpu")
    with pytest.raises(AblationError, match=message):
        write_single_file(tmp_path / "no.safetensors", unet, *small[1:])
    assert list(tmp_path.iterdir()) == []


def test_unknown_prediction_type_is_refused(small, tmp_path):
    with pytest.raises(AblationError, match='not "sample"'):
        write_single_file(tmp_path / "no.safetensors", *small, prediction_type="sample")


def test_unwritable_place(small, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(AblationError, match="Cannot write"):
        write_single_file(tmp_path / "file" / "model.safetensors", *small)
