"""Tests of the Forge host on Stable Diffusion 2.x and XL, collected by `test_webui.py` only.

Forge's own classes around narrow networks with random weights: the real ones do not fit into a test.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import backend.loader
import networks
import pytest
import torch
from backend.diffusion_engine.sd20 import StableDiffusion2
from backend.diffusion_engine.sdxl import StableDiffusionXL
from backend.nn.clip import IntegratedCLIP
from backend.nn.unet import IntegratedUNet2DConditionModel
from backend.nn.vae import IntegratedAutoencoderKL
from backend.operations import using_forge_operations
from backend.patcher.lora import model_lora_keys_clip, model_lora_keys_unet
from diffusers import EulerDiscreteScheduler
from huggingface_guess import model_list
from modules.prompt_parser import SdConditioning
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, modeling_utils

from concept_ablation.core import dataset
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.delta import Delta, LayerDelta, LowRank
from concept_ablation.core.delta_file import to_tensors
from concept_ablation.core.hosts import webui
from concept_ablation.core.hosts.webui import opened, patched
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings, train

REPOSITORIES = Path(backend.loader.__file__).parent / "huggingface" / "stabilityai"
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": -1,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth_middle": 1,
}
XL_UNET = {
    "num_classes": "sequential",
    "adm_in_channels": 48 + 6 * 256,
    "context_dim": 32 + 48,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
}
SD2_UNET = {"context_dim": 32, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "scaling_factor": 0.13025,
}


def in_forges_layers(make):
    """A network of Forge's layers with the random weights that torch's layers give."""
    torch.manual_seed(0)
    weights = make().state_dict()
    for name, weight in weights.items():
        if name.endswith("final_layer_norm.bias"):
            # as in trained models: Forge divides by the mean of the conditioning
            weight.fill_(0.1)
    with modeling_utils.no_init_weights(), using_forge_operations(device=torch.device("cpu"), dtype=torch.float32):
        network = make()
    network.load_state_dict(weights)
    return network.eval()


def text_encoder(width: int):
    config = CLIPTextConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    return in_forges_layers(lambda: IntegratedCLIP(CLIPTextModel, config, add_text_projection=True))


def parts(repository: Path, unet_config: dict, prediction: str) -> dict:
    unet = in_forges_layers(lambda: IntegratedUNet2DConditionModel.from_config(unet_config))
    unet._internal_dict = dict(unet_config)
    unet.storage_dtype = unet.computation_dtype = torch.float32
    unet.load_device = unet.initial_device = unet.offload_device = torch.device("cpu")
    scheduler = EulerDiscreteScheduler.from_pretrained(repository / "scheduler")
    scheduler.config.prediction_type = prediction
    return {
        "unet": unet,
        "vae": in_forges_layers(lambda: IntegratedAutoencoderKL.from_config(VAE)),
        "scheduler": scheduler,
        "tokenizer": CLIPTokenizer.from_pretrained(repository / "tokenizer"),
    }


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def engine(request):
    with torch.inference_mode():
        if request.param == "sd2":
            made = parts(REPOSITORIES / "stable-diffusion-2-1", {**UNET, **SD2_UNET}, "v_prediction")
            made["text_encoder"] = text_encoder(32)
            return StableDiffusion2(model_list.SD20({**UNET, **SD2_UNET}), made)
        repository = REPOSITORIES / "stable-diffusion-xl-base-1.0"
        made = parts(repository, {**UNET, **XL_UNET}, "epsilon")
        made |= {"text_encoder": text_encoder(32), "text_encoder_2": text_encoder(48)}
        made["tokenizer_2"] = CLIPTokenizer.from_pretrained(repository / "tokenizer_2")
        return StableDiffusionXL(model_list.SDXL({**UNET, **XL_UNET}), made)


@pytest.fixture
def small(monkeypatch):
    """Pictures of 64 pixels, computed in fp32 also where the hardware is fast at bf16."""
    monkeypatch.setattr(webui, "native_size", lambda *_: 64)
    monkeypatch.setattr(webui, "autocast_dtype", lambda *_: None)


@pytest.mark.usefixtures("small")
def test_conditioning_and_predictions_are_forges(engine):
    prompts, inner = ["a fish", "a (red:1.2) rose"], engine.forge_objects.unet.model
    xl = isinstance(engine, StableDiffusionXL)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for prompt in prompts:
        with opened(engine) as denoiser:
            cond, sigma = denoiser.encode([prompt]), denoiser.sigmas[[600]]
            found = denoiser.denoise(noise * sigma, sigma, cond)
        told = engine.get_learned_conditioning(SdConditioning([prompt], width=64, height=64))
        context, named = (told["crossattn"], {"y": told["vector"]}) if xl else (told, {})
        assert torch.equal(cond.context, context) and (not xl or torch.equal(cond.tensors["y"], told["vector"]))
        # with the attention that Forge would use here
        with torch.inference_mode():
            expected = inner.apply_model(noise * sigma, sigma, c_crossattn=context, transformer_options={}, **named)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_family_decides_architecture_and_size(engine):
    expected = ("sdxl", 128) if isinstance(engine, StableDiffusionXL) else ("sd2", 96)
    with opened(engine) as denoiser:
        assert denoiser.prediction_type == ("epsilon" if expected[0] == "sdxl" else "v_prediction")
        assert (denoiser.architecture, denoiser.latent_shape) == (expected[0], (4, expected[1], expected[1]))


@pytest.mark.usefixtures("small")
def test_every_layer_is_a_key_of_forges_lora_loader(engine):
    objects = engine.forge_objects_original
    keys = model_lora_keys_clip(objects.clip.cond_stage_model, model_lora_keys_unet(objects.unet.model, {}))
    with opened(engine) as denoiser:
        named = (*objects.unet.model.named_modules(), *denoiser.text_network.named_modules())
        names = {module: name for name, module in named}
        assert all(keys[name] == f"{names[module]}.weight" for name, module in denoiser.layers.items())
        starts = ("lora_te1_", "lora_te2_") if denoiser.architecture == "sdxl" else ("lora_te_",)
        for start in starts:
            assert f"{start}text_model_encoder_layers_0_self_attn_q_proj" in denoiser.layers
        assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k" in denoiser.layers


@pytest.mark.usefixtures("small")
def test_an_ablation_ends_in_a_delta_that_forge_loads_whole(engine, capsys):
    settings = DatasetSettings(images=2, preserve=0, prompts=2, sample=SampleSettings(steps=2), batch=2)
    training = TrainSettings(steps=2, batch=2, preserve_batch=0, learning_rate=1e-4)
    with opened(engine) as denoiser:
        data = dataset.build(denoiser, [Concept("tropical fish", "fish")], settings)
        made = train(denoiser, data, training)
    assert made.delta.norm() > 1e-5
    objects = SimpleNamespace(**vars(engine.forge_objects_original))
    capsys.readouterr()
    networks.load_lora_for_models(objects.unet, objects.clip, to_tensors(made.delta), 1.0, 1.0)
    told = capsys.readouterr().out
    assert f"with {len(made.delta.layers)} keys" in told and "(skipped 0 keys)" in told and "unmatched" not in told


@pytest.mark.parametrize("low", [False, True])
def test_all_names_of_a_weight_add_up(engine, low):
    """Our name, that of kohya's LoRAs for SDXL and that of the LoRAs that ComfyUI saves."""
    objects = engine.forge_objects_original
    key = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k"
    out, width = objects.unet.model.state_dict()[f"{key}.weight"].shape
    change = LowRank(torch.ones(out, 1), torch.full((1, width), 0.5))
    names = (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k",
        key,
    )
    delta = Delta({name: LayerDelta(change if low and name != key else change.dense()) for name in names})
    unet, _ = patched(objects.unet, objects.clip, delta)
    (patches,) = unet.lora_patches.values()
    ((patch,),) = patches.values()
    assert torch.equal(patch[1][1][0], torch.full((out, width), 1.5))
