"""The denoiser contract on diffusers models: timesteps, prompt cache, fingerprint, latent codec, layer names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as from_kohya
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizerFast as CLIPTokenizer

from concept_ablation.core.delta import Delta, LayerDelta, LowRank, zeros_in_rows
from concept_ablation.core.denoiser import Conditioning, true_direction
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import (
    EMBEDDED_MODEL,
    DiffusersCodec,
    DiffusersDenoiser,
    Parts,
    load_denoiser,
    load_parts,
)
from concept_ablation.core.samplers import SampleSettings, draw_images, sample_latents

BETAS = (1000, 0.00085, 0.012, "scaled_linear")
TOKEN_EMBEDDING = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"


@pytest.fixture
def timesteps_of(tiny):
    """The timesteps that the network is called with for given noise levels."""
    seen = []
    tiny.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))

    @torch.no_grad()
    def call(sigma):
        x = torch.zeros(len(sigma), 4, 8, 8)
        tiny.denoise(x, sigma, tiny.encode([""] * len(sigma)))
        return seen.pop()

    return call


def test_sigmas_are_those_of_the_schedule(tiny):
    alphas = DDPMScheduler(*BETAS).alphas_cumprod.double()
    torch.testing.assert_close(tiny.sigmas, ((1 - alphas) / alphas).sqrt().float())
    assert len(tiny.sigmas) == 1000 and (tiny.sigmas.diff() > 0).all()
    assert tiny.sigmas[0].item() == pytest.approx(0.0292, abs=1e-4), "SD 1.x' smallest level"
    assert tiny.sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3), "and its largest"


def test_timesteps_are_exact_on_the_table(tiny, timesteps_of):
    found = torch.cat([timesteps_of(part) for part in tiny.sigmas.split(250)])
    assert torch.equal(found, torch.arange(1000.0))


def test_timesteps_between_levels_are_those_of_diffusers(tiny, timesteps_of):
    sigma = torch.linspace(tiny.sigmas[0].log(), tiny.sigmas[-1].log(), 237).exp()
    found = timesteps_of(sigma)
    assert (found.diff() > 0).all()
    scheduler = EulerDiscreteScheduler(*BETAS)
    table = tiny.sigmas.double().log().numpy()
    expected = [float(scheduler._sigma_to_t(np.array(float(s)), table)) for s in sigma]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-3)
    middle = (tiny.sigmas[500] * tiny.sigmas[501]).sqrt().view(1)
    assert timesteps_of(middle).item() == pytest.approx(500.5, abs=1e-3)


def test_levels_beyond_the_table_take_its_ends(tiny, timesteps_of):
    assert timesteps_of(torch.tensor([1e-3, 100.0])).tolist() == [0.0, 999.0]


def test_a_schedule_with_zero_terminal_snr_stays_finite(tiny):
    text, vae = tiny.text_network, tiny.vae._vae
    schedule = {
        **dict(DDPMScheduler(*BETAS, rescale_betas_zero_snr=True).config),
        "prediction_type": "v_prediction",
    }
    model = DiffusersDenoiser(
        Parts(tiny.network, text, tiny._tokenizer, vae, schedule), "zsnr", torch.device("cpu"), None
    )
    assert torch.isfinite(model.sigmas).all() and model.sigmas[-1] > 1000
    assert torch.isfinite(sample_latents(model, ["a cat"], [0], SampleSettings(3))).all()


def test_an_unknown_prediction_type_is_refused(make_model):
    with pytest.raises(AblationError, match="'sample': only epsilon and v_prediction"):
        make_model(prediction_type="sample")


@torch.no_grad()
def test_noise_and_directions(tiny):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    sigma = tiny.sigmas[[100, 900]]
    x = tiny.add_noise(x0, noise, sigma)
    for row in range(2):
        torch.testing.assert_close(x[row], x0[row] + sigma[row] * noise[row])
    torch.testing.assert_close(true_direction(x, sigma, x0), noise, rtol=1e-3, atol=1e-3)
    # of an epsilon model the direction is what the network says
    cond = tiny.encode(["a cat", "a dog"])
    scale = (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    said = tiny.network(x / scale, torch.tensor([100, 900]), encoder_hidden_states=cond.context).sample
    torch.testing.assert_close(tiny.direction(x, sigma, cond), said, rtol=1e-3, atol=1e-4)


def test_conditioning_is_indexed_and_joined_by_row():
    one = Conditioning({"context": torch.arange(6.0).view(3, 1, 2), "pooled": torch.arange(3.0).view(3, 1)})
    joined = Conditioning.cat([one[[2, 0]], one[1:2]])
    assert len(joined) == 3 and joined.tensors["pooled"].flatten().tolist() == [2, 0, 1]
    assert joined.context[:, 0, 0].tolist() == [4, 0, 2]
    assert joined.tensors.keys() == {"context", "pooled"}


@pytest.fixture
def encoded(tiny, monkeypatch):
    """The batches of prompts that went through the text encoder."""
    batches, encode = [], tiny._encode
    monkeypatch.setattr(tiny, "_encode", lambda prompts: batches.append(list(prompts)) or encode(prompts))
    return batches


@torch.no_grad()
def test_each_distinct_prompt_is_encoded_once(tiny, encoded):
    first = tiny.encode(["a cat", "a dog", "a cat"]).context
    assert encoded == [["a cat", "a dog"]] and first.shape == (3, 77, 16)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    again = tiny.encode(["a dog", "a hat", "a cat"]).context
    assert encoded == [["a cat", "a dog"], ["a hat"]]
    assert torch.equal(again[0], first[1]) and torch.equal(again[2], first[0])
    tiny.encode([f"prompt {i}" for i in range(40)])
    assert [len(batch) for batch in encoded] == [2, 1, 32, 8]


def test_prompts_are_encoded_afresh_with_gradients(tiny, encoded):
    with torch.no_grad():
        kept = tiny.encode(["a cat"]).context
    tiny.text_network.requires_grad_(True)
    for _ in range(2):
        context = tiny.encode(["a cat"]).context
        assert context.requires_grad
        torch.testing.assert_close(context.detach(), kept)
    assert len(encoded) == 3


@torch.no_grad()
def test_the_cache_is_bypassed_while_the_text_encoder_is_edited(tiny, encoded):
    kept = tiny.encode(["a grumpy cat", "a dog"]).context
    rows = tiny.tokenize("grumpy")
    weight = zeros_in_rows(TOKEN_EMBEDDING, tiny.layers[TOKEN_EMBEDDING], rows).layers[TOKEN_EMBEDDING].weight
    down = torch.randn(weight.down.shape, generator=torch.Generator().manual_seed(0))
    delta = Delta({TOKEN_EMBEDDING: LayerDelta(LowRank(weight.up, down))})
    with delta.attach(tiny) as attachment:
        edited = tiny.encode(["a grumpy cat", "a dog"]).context
        assert not torch.allclose(edited[0], kept[0], atol=1e-3), "the edited token moves its prompt"
        torch.testing.assert_close(edited[1], kept[1], msg="and no other prompt")
        tiny.encode(["a hat"])
        with attachment.disabled():
            torch.testing.assert_close(tiny.encode(["a grumpy cat", "a dog"]).context, kept)
        with delta.attach(tiny):
            pass
        assert not torch.allclose(tiny.encode(["a grumpy cat"]).context, kept[:1], atol=1e-3), "one is still on"
    assert len(encoded) == 5
    assert torch.equal(tiny.encode(["a grumpy cat", "a dog"]).context, kept) and len(encoded) == 5
    unedited = tiny.encode(["a hat"]).context
    assert len(encoded) == 6, "what was encoded under the edit was not kept"
    assert torch.equal(unedited, tiny._encode(["a hat"]).context)


@torch.no_grad()
def test_a_delta_on_the_network_leaves_the_cache_alone(tiny, encoded):
    name = next(name for name in tiny.layers if name.endswith("attn2_to_k"))
    with Delta({name: LayerDelta(torch.ones_like(tiny.layers[name].weight))}).attach(tiny):
        tiny.encode(["a cat"])
        tiny.encode(["a cat"])
    assert len(encoded) == 1


def test_tokens_come_without_start_end_and_padding(tiny):
    # the ids of OpenAI's CLIP vocabulary
    assert tiny.tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tiny.tokenize("Grumpy  Cat") == tiny.tokenize("grumpy cat")
    assert len(tiny.tokenize("cat " * 200)) <= 77


def test_the_fingerprint_follows_the_weights_and_nothing_else(make_model):
    model, twin = make_model(seed=1), make_model(seed=1)
    before = model.fingerprint()
    assert len(before) == 64 and int(before, 16) and before == twin.fingerprint() == model.fingerprint()
    name = next(iter(model.layers))
    with Delta({name: LayerDelta(torch.ones_like(model.layers[name].weight))}).attach(model):
        sample_latents(model, ["a cat"], [0], SampleSettings(2))
        assert model.fingerprint() == before
    seen = {before}
    for module in (model.network.conv_in, model.network.time_embedding.linear_1, model.text_network):
        with torch.no_grad():
            weight = next(module.parameters())
            weight[(0,) * weight.dim()] += 1e-3
        seen.add(model.fingerprint())
    assert len(seen) == 4
    assert make_model(seed=2).fingerprint() not in seen


@torch.no_grad()
def test_kl_autoencoders_are_scaled_as_diffusers_scales_them():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, scaling_factor=0.25, **blocks).eval()
    codec, images = DiffusersCodec(vae), torch.rand(2, 3, 16, 16)
    mean = vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(codec.encode(images), mean * 0.25)
    torch.testing.assert_close(codec.decode(mean * 0.25), (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1))


def test_pictures_that_are_decoded_in_bf16_are_those_of_fp32_within_a_grey_level(drawn):
    vae = load_parts(EMBEDDED_MODEL).vae.eval()
    exact = DiffusersCodec(vae).decode(drawn)
    fast = DiffusersCodec(vae, torch.bfloat16).decode(drawn)
    assert fast.dtype == torch.float32
    differences = (fast - exact).abs() * 255
    assert 0 < differences.mean() < 1 and differences.max() < 16


@pytest.fixture(scope="module")
def drawn(emoji):
    """Latents of pictures that the embedded model drew, [3, 4, 16, 16]."""
    return sample_latents(emoji, ["a cat", "a red apple", "a smiling face"], [1, 2, 3], SampleSettings(12))


def test_a_drawn_image_survives_the_codec(emoji, drawn):
    images = emoji.vae.decode(drawn)
    assert images.shape == (3, 3, 128, 128) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    latents = emoji.vae.encode(images)
    assert latents.shape == drawn.shape and latents.dtype == torch.float32
    error = (emoji.vae.decode(latents) - images).square().mean(dim=(1, 2, 3))
    assert (-10 * error.log10() > 20).all(), "PSNR in dB"
    scale = (latents * drawn).sum() / drawn.square().sum()
    assert scale.item() == pytest.approx(1, abs=0.1), "encoding returns to the latent scale of the network"


def test_the_picture_is_that_of_the_diffusers_pipeline():
    plain = load_denoiser(precision="fp32")
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents, images = (
        pipe("a cat", latents=start.clone(), num_inference_steps=4, guidance_scale=4.0, output_type=kind).images
        for kind in ("latent", "np")
    )
    decoded = plain.vae.decode(latents).permute(0, 2, 3, 1)
    torch.testing.assert_close(decoded, torch.from_numpy(images), rtol=0, atol=1e-5)


def test_draw_images_decodes_what_sample_latents_draws(emoji, drawn):
    images = draw_images(emoji, ["a cat", "a red apple", "a smiling face"], [1, 2, 3], SampleSettings(12))
    expected = (emoji.vae.decode(drawn) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(float) - expected).max() <= 1


@pytest.fixture(scope="module")
def sd1():
    """The genuine layout of Stable Diffusion 1.5, without storage."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
            )
        )
        vae = AutoencoderTiny()
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
    return DiffusersDenoiser(Parts(unet, text, tokenizer, vae, {}), "sd1", torch.device("meta"), None)


def test_layers_have_the_names_that_loras_use(sd1):
    expected = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (1280, 1280),
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj": (2560, 320),
        "lora_unet_down_blocks_1_attentions_1_proj_in": (640, 640, 1, 1),
        "lora_unet_up_blocks_1_resnets_0_conv1": (1280, 2560, 3, 3),
        "lora_unet_down_blocks_0_downsamplers_0_conv": (320, 320, 3, 3),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_te_text_model_encoder_layers_11_mlp_fc2": (768, 3072),
        TOKEN_EMBEDDING: (49408, 768),
    }
    assert {name: tuple(sd1.layers[name].weight.shape) for name in expected} == expected
    assert sd1.architecture == "sd1" and sd1.latent_shape == (4, 64, 64)
    # kohya's trainer writes 192 U-Net and 72 text encoder layers for Stable Diffusion 1.x
    transformer = [name for name in sd1.layers if "_attentions_" in name and "norm" not in name]
    text = [n for n in sd1.layers if n.startswith("lora_te_") and n.rpartition("_")[2] in ("proj", "fc1", "fc2")]
    assert len(transformer) == 192 and len(text) == 72
    assert sum(name.endswith(("attn2_to_k", "attn2_to_v")) for name in sd1.layers) == 32


def test_diffusers_reads_the_names_as_the_same_layers(sd1):
    modules = dict(sd1.network.named_modules())
    named = {name: layer for name, layer in sd1.layers.items() if "_transformer_blocks_0_attn" in name}
    tensors = {}
    for number, name in enumerate(named):
        tensors |= {f"{name}.lora_down.weight": torch.tensor([number]), f"{name}.alpha": torch.tensor(1.0)}
        tensors |= {f"{name}.lora_up.weight": torch.tensor([number])}
    converted, _ = from_kohya(tensors)
    found = {
        int(tensor): modules[
            key.removeprefix("unet.").replace("processor.", "").replace("to_out", "to_out.0").split("_lora")[0]
        ]
        for key, tensor in converted.items()
        if ".down." in key
    }
    assert len(found) == len(named) == 128
    for (number, layer), (_, expected) in itertools.zip_longest(sorted(found.items()), enumerate(named.values())):
        assert layer is expected, list(named)[number]


def test_every_layer_is_named_once(sd1, emoji):
    for model in (sd1, emoji):
        assert len({id(layer) for layer in model.layers.values()}) == len(model.layers)
        owned = {id(module) for part in (model.network, model.text_network) for module in part.modules()}
        assert all(id(layer) in owned for layer in model.layers.values())
