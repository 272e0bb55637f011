"""Tests of the ComfyUI host on ComfyUI's real classes, collected by `test_nodes.py` only.

Models are loaded in inference mode, as ComfyUI's executor loads them. The diffusers host is the reference.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import comfy.lora
import comfy.sd
import numpy as np
import pytest
import torch
from comfy import model_base, supported_models
from diffusers import AutoencoderTiny

from concept_ablation.core import dataset
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.delta_file import to_tensors
from concept_ablation.core.errors import AblationError, IncompatibleDelta, Interrupted
from concept_ablation.core.hosts.comfy_emoji import load_emoji_diffusion
from concept_ablation.core.hosts.comfyui import architecture_of, opened, patched, text_layers, unet_layers
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.hosts.single_file import ldm_tensors
from concept_ablation.core.samplers import SampleSettings, draw_images, sample_latents
from concept_ablation.core.trainer import TrainSettings, train
from concept_ablation.tests.comfyui.checkpoint import sd15_parts

PROMPTS = ["a tropical fish", "a rose by flat on a blue background"]
FISH = Concept("tropical fish", "fish")
SMALL = DatasetSettings(images=8, preserve=8, prompts=4, sample=SampleSettings(steps=4), batch=8)
TRAIN = TrainSettings(steps=3, batch=4, preserve_batch=2, learning_rate=1e-4)


def weight_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def in_fp32(*parts, **size):
    """`opened`, computing in fp32 also where the hardware is fast at bf16."""
    with opened(*parts, **size) as denoiser:
        denoiser._autocast = None
        yield denoiser


@pytest.fixture(scope="module")
def comfy_emoji():
    with torch.inference_mode():
        return load_emoji_diffusion()


@pytest.fixture(scope="module")
def reference():
    return load_denoiser(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def data(reference):
    return dataset.build(reference, [FISH], SMALL)


@pytest.fixture
def ours(comfy_emoji):
    with torch.inference_mode(), in_fp32(*comfy_emoji) as denoiser:
        yield denoiser


def random_delta(denoiser, size: float = 0.02) -> Delta:
    rng = torch.Generator().manual_seed(0)
    names = [name for name in denoiser.layers if "attn2_to_k" in name or "attn2_to_v" in name]
    shapes = {name: denoiser.layers[name].weight.shape for name in names}
    return Delta({name: LayerDelta(size * torch.randn(shape, generator=rng)) for name, shape in shapes.items()})


def random_sd15(**options: object):
    """A stock MODEL and CLIP of random weights in the SD 1.5 layout, two levels deep, with its full-size CLIP-L."""
    tensors = ldm_tensors(*sd15_parts(), AutoencoderTiny())
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(tensors, model_options=options)
    return model, clip, vae


# --- The same model as the diffusers host ---------------------------------------------------------------------------


def test_predictions_conditioning_and_images_are_those_of_the_diffusers_host(ours, reference):
    mine, theirs = ours.encode(PROMPTS), reference.encode(PROMPTS)
    torch.testing.assert_close(mine.context, theirs.context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.sigmas, reference.sigmas, atol=1e-5, rtol=1e-5)
    noise = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(1))
    sigma = ours.sigmas[[500, 900]]
    x = ours.add_noise(torch.zeros_like(noise), noise, sigma)
    torch.testing.assert_close(x, reference.add_noise(torch.zeros_like(noise), noise, sigma))
    found, expected = ours.denoise(x, sigma, mine), reference.denoise(x, sigma, theirs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.vae.decode(noise), reference.vae.decode(noise), atol=1e-5, rtol=1e-5)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours.vae.encode(images), reference.vae.encode(images), atol=1e-5, rtol=1e-5)
    assert ours.tokenize("grumpy cat") == reference.tokenize("grumpy cat")
    assert ours.latent_shape == reference.latent_shape and ours.architecture == reference.architecture
    assert ours.learning_rate_scale == reference.learning_rate_scale
    assert ours.learning_rate_scales == reference.learning_rate_scales


def test_layers_have_the_names_of_the_diffusers_host(ours, reference):
    for name, module in reference.layers.items():
        if "layer_norm" not in name:
            assert torch.equal(ours.layers[name].weight.float(), module.weight.float()), name


@pytest.mark.parametrize("subset", ["cross-attn", "embedding", "full"])
def test_training_gives_the_delta_of_the_diffusers_host(ours, reference, data, subset):
    settings = replace(TRAIN, subset=subset)
    mine, theirs = train(ours, data, settings), train_outside(reference, data, settings)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-3)
    for name, layer in theirs.delta.layers.items():
        for found, expected in zip(mine.delta.layers[name].tensors(), layer.tensors(), strict=True):
            # Adam's first steps are the sign of the gradient, which rounding decides where it is almost nothing
            close = torch.isclose(found, expected, atol=2e-5, rtol=1e-2)
            assert close.float().mean() > 0.999, name


def train_outside(denoiser, data, settings):
    """Train a model that was made outside of inference mode."""
    with torch.inference_mode(False):
        return train(denoiser, data, settings)


def test_checkpointing_changes_memory_not_the_delta(ours, data):
    made, calls = [], []
    with ours.network.middle_block[1].norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled())):
        for flag in (False, True):
            calls.append(None)
            made.append(train(ours, data, replace(TRAIN, checkpointing=flag)).delta)
    plain, saved = made
    for name, layer in plain.layers.items():
        torch.testing.assert_close(saved.layers[name].weight, layer.weight, rtol=1e-4, atol=1e-7)
    start = calls.index(None, 1)
    # in each step the block runs once, and once more in the backward pass
    assert (calls[:start].count(True), calls[start:].count(True)) == (TRAIN.steps, 2 * TRAIN.steps)
    assert not any("forward" in vars(module) for module in ours.network.modules())


def test_checkpointing_is_refused_where_it_would_do_nothing(ours, monkeypatch):
    monkeypatch.setattr(ours, "network", torch.nn.Linear(1, 1))
    with pytest.raises(AblationError, match="switch checkpointing off"), ours.checkpointed():
        pass


def test_prompts_longer_than_one_window_share_a_batch_with_short_ones(ours):
    long = ", ".join(["a big red tropical fish"] * 20)
    both = ours.encode(["a fish", long])
    assert len(both) == 2 and both.context.shape[1] == 154
    x, sigma = torch.randn(1, *ours.latent_shape), ours.sigmas[[500]]
    alone = ours.denoise(x, sigma, ours.encode(["a fish"]))
    torch.testing.assert_close(ours.denoise(x, sigma, both[:1]), alone, atol=1e-4, rtol=1e-4)


# --- The MODEL that others share --------------------------------------------------------------------------------------


def test_weights_stay_after_success_cancel_and_error(comfy_emoji, data):
    model, clip, _ = comfy_emoji
    before = weight_hash(model.model), weight_hash(clip.cond_stage_model)

    def cancel(progress):
        raise Interrupted("stop")

    with torch.inference_mode(), in_fp32(*comfy_emoji) as denoiser:
        train(denoiser, data, TRAIN)
    with pytest.raises(Interrupted), torch.inference_mode(), in_fp32(*comfy_emoji) as denoiser:
        train(denoiser, data, TRAIN, cancel)
    with pytest.raises(AblationError), torch.inference_mode(), opened(*comfy_emoji) as denoiser:
        train(denoiser, data, replace(TRAIN, learning_rate=1e3, steps=10))
    assert (weight_hash(model.model), weight_hash(clip.cond_stage_model)) == before
    hooked = [module for part in (model.model, clip.cond_stage_model) for module in part.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked)


def test_patches_do_what_hooks_do_and_leave_the_first_model_alone(comfy_emoji):
    model, clip, vae = comfy_emoji
    settings = SampleSettings(steps=4)
    with torch.inference_mode():
        with in_fp32(model, clip, vae) as denoiser:
            delta = random_delta(denoiser)
            plain = draw_images(denoiser, PROMPTS, [1, 2], settings).astype(int)
            with delta.attach(denoiser):
                hooked = draw_images(denoiser, PROMPTS, [1, 2], settings).astype(int)
        edited = patched(model, clip, delta)
        with in_fp32(*edited, vae) as denoiser:
            as_patch = draw_images(denoiser, PROMPTS, [1, 2], settings).astype(int)
        with in_fp32(model, clip, vae) as denoiser:
            again = draw_images(denoiser, PROMPTS, [1, 2], settings).astype(int)
    assert np.abs(hooked - plain).max() > 20
    assert np.abs(hooked - as_patch).max() <= 2
    assert np.array_equal(plain, again)


def test_a_lora_on_the_model_takes_part_in_training(comfy_emoji, data):
    model, clip, vae = comfy_emoji
    with torch.inference_mode():
        with in_fp32(model, clip, vae) as denoiser:
            plain, delta = train(denoiser, data, TRAIN).losses, random_delta(denoiser)
        with in_fp32(*patched(model, clip, delta), vae) as denoiser:
            edited = train(denoiser, data, TRAIN).losses
    assert plain != pytest.approx(edited, rel=1e-3)


def test_a_delta_of_another_model_is_refused_in_one_sentence(comfy_emoji, ours):
    model, clip, _ = comfy_emoji
    name, module = next((n, m) for n, m in ours.layers.items() if n.endswith("attn2_to_k"))
    wide = Delta({name: LayerDelta(torch.zeros(module.weight.shape[0] + 1, module.weight.shape[1]))})
    with pytest.raises(IncompatibleDelta, match="has the shape"):
        patched(model, clip, wide)
    unknown = Delta({"lora_unet_no_such_layer": LayerDelta(torch.zeros(2, 2))})
    with pytest.raises(IncompatibleDelta, match="does not have, first lora_unet_no_such_layer"):
        patched(model, clip, unknown)
    text = Delta({"lora_te2_text_model_encoder_layers_0_mlp_fc1": LayerDelta(torch.zeros(1024, 256))})
    with pytest.raises(IncompatibleDelta, match="connect the CLIP"):
        patched(model, clip, text)


# --- Other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_a_stock_sd15_layout_trains_in_any_precision_and_its_keys_all_map(dtype):
    model, clip, vae = random_sd15(dtype=dtype)
    with torch.inference_mode(), opened(model, clip, vae, width=64, height=64) as denoiser:
        assert denoiser.architecture == "sd1" and denoiser.sigmas[-1] == pytest.approx(14.6, abs=0.1)
        data = dataset.build(denoiser, [Concept("grumpy cat", "cat")], replace(SMALL, images=2, preserve=0, batch=2))
        result = train(denoiser, data, replace(TRAIN, steps=2, batch=2, preserve_batch=0, learning_rate=1e-5))
    assert all(np.isfinite(result.losses)) and result.delta.norm() > 1e-6
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    assert {name: keys[name] for name in result.delta.layers}
    assert len(comfy.lora.load_lora(to_tensors(result.delta), keys)) == len(result.delta.layers)


@pytest.mark.parametrize("family", ["SDXL", "Segmind_Vega", "SSD1B"])
def test_every_layer_of_an_sdxl_has_a_name_that_stock_loras_use(family):
    config = getattr(supported_models, family)
    depths = {"SDXL": [0, 0, 2, 2, 10, 10], "Segmind_Vega": [0, 0, 1, 1, 2, 2], "SSD1B": [0, 0, 2, 2, 4, 4]}[family]
    unet = {
        **config.unet_config,
        "in_channels": 4,
        "out_channels": 4,
        "image_size": 32,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": depths,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
    }
    inner = model_base.SDXL(config(unet), device=torch.device("meta"))
    assert architecture_of(inner) == "sdxl"
    layers, keys = unet_layers(inner), comfy.lora.model_lora_keys_unet(inner, {})
    names = {module: name for name, module in inner.named_modules()}
    assert all(keys[name] == f"{names[module]}.weight" for name, module in layers.items())
    cross = [name for name in layers if name.endswith(("attn2_to_k", "attn2_to_v"))]
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k" in cross and len(cross) > 20


def test_text_layers_map_to_their_own_weights(comfy_emoji):
    encoder = comfy_emoji[1].cond_stage_model
    keys = comfy.lora.model_lora_keys_clip(encoder, {})
    names = {module: name for name, module in encoder.named_modules()}
    for name, module in text_layers(encoder).items():
        assert keys[name] == f"{names[module]}.weight"


def test_variants_with_further_inputs_are_refused():
    config = supported_models.SD15({"in_channels": 9, "context_dim": 768})
    config.unet_config["disable_unet_model_creation"] = True
    with pytest.raises(AblationError, match="not an inpainting"):
        architecture_of(model_base.BaseModel(config))
    flux = supported_models.Flux({"in_channels": 16, "disable_unet_model_creation": True})
    with pytest.raises(AblationError, match="is a Flux"):
        architecture_of(model_base.BaseModel(flux, model_type=model_base.ModelType.FLUX))


def test_sizes_that_no_latent_has_are_refused(comfy_emoji):
    with pytest.raises(AblationError, match="multiples of 8"), opened(*comfy_emoji, width=100, height=128):
        pass


def test_images_need_a_vae(comfy_emoji):
    model, clip, _ = comfy_emoji
    with torch.inference_mode(), opened(model, clip) as denoiser, pytest.raises(AblationError, match="connect one"):
        denoiser.vae.decode(torch.zeros(1, 4, 16, 16))


def test_the_previews_of_the_embedded_model_show_its_pictures(comfy_emoji, ours):
    latents = sample_latents(ours, ["a cat on a red background", "a rose"], [1, 2], SampleSettings(steps=6))
    colours = torch.nn.functional.avg_pool2d(ours.vae.decode(latents), 8).permute(0, 2, 3, 1)
    stock, form = supported_models.SD15({}).latent_format, comfy_emoji[0].model.latent_format

    def error(factors, bias) -> float:
        shown = latents.permute(0, 2, 3, 1) @ torch.tensor(factors) + torch.tensor(bias)
        return ((shown + 1) / 2 - colours).abs().mean().item()

    own = error(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    assert own < 0.15 and own < 0.6 * error(stock.latent_rgb_factors, [0.0] * 3)
    assert form.latent_rgb_factors != stock.latent_rgb_factors
