"""Tests of the ComfyUI host on small random models of each family, against what ComfyUI's own sampling does with them.

Collected by `test_nodes.py` only. Stock detection knows no model this small, so configurations are given by hand.
"""

from __future__ import annotations

import contextlib

import comfy.lora
import comfy.sample
import comfy.sd
import numpy as np
import pytest
import torch
from comfy import model_base, model_management, supported_models
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from concept_ablation.core import dataset
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.delta import Delta, LayerDelta, LowRank, merge
from concept_ablation.core.delta_file import to_tensors
from concept_ablation.core.hosts import ldm_patcher
from concept_ablation.core.hosts.comfyui import fitted, opened, patched
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings, train

CPU = torch.device("cpu")
PIXELS = 64
CAT = Concept("grumpy cat", "cat")
TINY_TEXT = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
WIDTHS = {"sd1": {"clip_l": 32}, "sd2": {"clip_h": 32}, "sdxl": {"clip_l": 32, "clip_g": 64}}
CONFIGS = {"sd1": supported_models.SD15, "sd2": supported_models.SD20, "sdxl": supported_models.SDXL}
SDXL_SIZES = 1536
"""Width of SDXL's size embeddings, which follow the pooled output in `y`."""


def small(family: str, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None, v_prediction: bool = False):
    """MODEL and CLIP of a family with random weights, made in inference mode as a loader node makes them.

    Args:
        dtype: of the U-Net's weights.
        cast: ComfyUI's "manual cast", the type that it computes in where that is another one.
    """
    torch.manual_seed(0)
    widths = WIDTHS[family]
    unet = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [0, 2] if family == "sdxl" else [1, 1],
        "transformer_depth_output": [0, 0, 2, 2] if family == "sdxl" else [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": family != "sd1",
        "context_dim": sum(widths.values()),
        "adm_in_channels": widths["clip_g"] + SDXL_SIZES if family == "sdxl" else None,
        "legacy": False,
        "dtype": dtype,
    }
    if family == "sdxl":
        unet["num_classes"] = "sequential"
    options = {f"{name}_model_config": {**TINY_TEXT, "hidden_size": width} for name, width in widths.items()}
    with torch.inference_mode():
        config = CONFIGS[family](unet)
        config.set_inference_dtype(dtype, cast)
        kind = model_base.SDXL if family == "sdxl" else model_base.BaseModel
        prediction = model_base.ModelType.V_PREDICTION if v_prediction else model_base.ModelType.EPS
        inner = kind(config, model_type=prediction, device=CPU)
        clip = comfy.sd.CLIP(config.clip_target({}), model_options={**options, "dtype": torch.float32})
        for part in (inner.diffusion_model, clip.cond_stage_model):
            for name, weight in part.named_parameters():
                if weight.dim() > 1:
                    weight.copy_(0.1 * torch.randn(weight.shape))
                else:
                    # gains of norms are 1, biases 0
                    weight.copy_(torch.full(weight.shape, float(name.endswith(".weight"))))
    return ModelPatcher(inner, load_device=CPU, offload_device=CPU), clip


def stock_prediction(model, clip, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x, sigma, D) of the first step that ComfyUI's own sampling makes for a prompt."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(apply_model, given):
        output = apply_model(given["input"], given["timestep"], **given["c"])
        seen.append((given["input"].clone(), given["timestep"].clone(), output.clone()))
        return output

    watched = model.clone()
    watched.set_model_unet_function_wrapper(record)
    latent = torch.zeros(1, 4, PIXELS // 8, PIXELS // 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        # at a guidance of 1 ComfyUI leaves the empty prompt out
        comfy.sample.sample(watched, noise, 1, 1.0, "euler", "normal", cond, cond, latent, seed=7)
    return tuple(part[:1].clone() for part in seen[0])


@contextlib.contextmanager
def in_fp32(*parts, **size):
    """`opened`, computing in fp32 also where the hardware is fast at bf16."""
    with opened(*parts, **size) as denoiser:
        denoiser._autocast = None
        yield denoiser


def build(denoiser, images: int = 2):
    settings = DatasetSettings(images=images, preserve=0, prompts=2, sample=SampleSettings(steps=2), batch=2)
    return dataset.build(denoiser, [CAT], settings)


SETTINGS = TrainSettings(steps=2, batch=2, preserve_batch=0, learning_rate=1e-5)


@pytest.mark.parametrize(("family", "v_prediction"), [("sd1", False), ("sd2", False), ("sd2", True), ("sdxl", False)])
def test_predictions_are_those_of_comfyuis_own_sampling(family, v_prediction):
    model, clip = small(family, v_prediction=v_prediction)
    prompt = "a (grumpy:1.3) cat"
    x, sigma, expected = stock_prediction(model, clip, prompt)
    with torch.inference_mode(), in_fp32(model, clip, width=PIXELS, height=PIXELS) as denoiser:
        assert denoiser.architecture == family
        assert denoiser.prediction_type == ("v_prediction" if v_prediction else "epsilon")
        found = denoiser.denoise(x, sigma, denoiser.encode([prompt]))
        other = denoiser.denoise(x, sigma, denoiser.encode(["a grumpy cat"]))
        assert denoiser.sigmas[-1] == pytest.approx(sigma.item(), rel=1e-3)
        if family == "sdxl":
            assert denoiser.encode([prompt]).tensors["y"].shape == (1, 64 + SDXL_SIZES)
    # D = x - sigma * epsilon at sigma 14.6: rounding in epsilon is multiplied by sigma, also where D is almost nothing
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
    assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("subset", ["cross-attn", "embedding", "full"])
def test_every_family_trains_and_stock_lora_loading_applies_every_weight(family, subset):
    model, clip = small(family)
    with torch.inference_mode(), opened(model, clip, width=PIXELS, height=PIXELS) as denoiser:
        settings = TrainSettings(**{**vars(SETTINGS), "subset": subset})
        delta = train(denoiser, build(denoiser), settings).delta
    assert all(float(layer.squared_norm()) > 0 for layer in delta.layers.values())
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
    parts = sum((layer.weight is not None) + (layer.bias is not None) for layer in delta.layers.values())
    assert len(comfy.lora.load_lora(to_tensors(delta), keys)) == parts
    if subset == "embedding":
        embedding = "text_encoders.{}.transformer.text_model.embeddings.token_embedding"
        assert delta.layers.keys() == {embedding.format(name) for name in WIDTHS[family]}
    edited = patched(model, clip, delta)
    assert sum(len(patcher.patches) for patcher in (edited[0], edited[1].patcher)) == parts


def applied(model, clip, delta: Delta, key: str) -> Tensor:
    """What ComfyUI adds to the weight `key` for the delta."""
    edited, edited_clip = patched(model, clip, delta)
    patcher = edited_clip.patcher if key.startswith("clip_") else edited
    weight = patcher.model.state_dict()[key]
    return comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key) - weight


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (
            "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
            (
                "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
                "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k",
                "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k",
            ),
        ),
        (
            "clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
            (
                "lora_te2_text_model_encoder_layers_1_mlp_fc1",
                "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1",
            ),
        ),
    ],
)
def test_all_names_of_a_weight_are_applied_and_become_one(key, names):
    """Our names, those of kohya's LoRAs for SDXL and those of the LoRAs that ComfyUI saves."""
    model, clip = small("sdxl")
    out, width = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}[key].shape
    changes = (
        torch.full((out, width), 0.5),
        LowRank(torch.ones(out, 1), torch.ones(1, width)),
        LowRank(torch.full((out, 1), 0.25), torch.ones(1, width)),
    )
    given = {name: LayerDelta(change) for name, change in zip(names, changes, strict=False)}
    with torch.inference_mode():
        expected = torch.full((out, width), sum((0.5, 1.0, 0.25)[: len(names)]))
        torch.testing.assert_close(applied(model, clip, Delta(given), key), expected)
        parts = [fitted(model, clip, Delta({name: layer})) for name, layer in given.items()]
        total = merge((part, 1.0) for part in parts)
        assert total.layers.keys() == {names[0]}
        torch.testing.assert_close(applied(model, clip, total, key), expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("low", [False, True])
def test_a_1x1_convolution_and_the_linear_layer_that_does_the_same_take_the_same_change(family, low):
    """Stable Diffusion 1's projections are the former, those of 2 and XL the latter."""
    model, clip = small(family)
    key = "diffusion_model.middle_block.1.proj_in.weight"
    shape = model.model.state_dict()[key].shape
    assert len(shape) == (4 if family == "sd1" else 2)
    rest = (shape[1],) if len(shape) == 4 else (shape[1], 1, 1)
    low_rank = LowRank(torch.ones(shape[0], 1), torch.full((1, *rest), 0.5))
    delta = Delta({"lora_unet_mid_block_attentions_0_proj_in": LayerDelta(low_rank if low else low_rank.dense())})
    with torch.inference_mode():
        torch.testing.assert_close(applied(model, clip, delta, key), torch.full(shape, 0.5))


def test_of_two_names_that_diffusers_has_for_a_layer_the_same_is_taken_always():
    layer, network = torch.nn.Linear(1, 1), torch.nn.Module()
    network.label_emb = torch.nn.Sequential(torch.nn.Sequential(layer))
    names = [f"{kind}_embedding.linear_1.weight" for kind in ("add", "class")]
    for order in (names, names[::-1]):
        found = ldm_patcher.unet_layers(network, dict.fromkeys(order, "label_emb.0.0.weight"))
        assert found == {"lora_unet_add_embedding_linear_1": layer}


@pytest.mark.parametrize(
    ("dtype", "cast", "likeness"),
    [
        (torch.float16, None, 0.999),
        (torch.float16, torch.float32, 0.98),
        (torch.bfloat16, None, 0.98),
        (torch.float8_e4m3fn, torch.bfloat16, 0.98),
    ],
)
def test_weights_in_storage_precision_give_the_gradients_of_their_fp32_values(dtype, cast, likeness):
    model, clip = small("sd1", dtype, cast)
    exact, exact_clip = small("sd1")
    for mine, theirs in zip(exact.model.parameters(), model.model.parameters(), strict=True):
        with torch.inference_mode():
            mine.copy_(theirs.float())
    with torch.inference_mode():
        with in_fp32(exact, exact_clip, width=PIXELS, height=PIXELS) as denoiser:
            data = build(denoiser)
            expected = first_step(denoiser, data)
        with opened(model, clip, width=PIXELS, height=PIXELS) as denoiser:
            found = first_step(denoiser, data)
    # without the gradient scale, fp16 loses 0.2 % of them
    assert found.isfinite().all() and (found != 0).all()
    assert torch.cosine_similarity(found, expected, dim=0) > likeness


def first_step(denoiser, data) -> Tensor:
    """The gradients of a first training step, in one row."""
    gradients: list[Tensor] = []

    def keep(parameters, *_):
        gradients.extend(parameter.grad.flatten().clone() for parameter in parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", keep)
        train(denoiser, data, TrainSettings(**{**vars(SETTINGS), "steps": 1}))
    return torch.cat(gradients).clone()


def test_offloaded_layers_with_a_lora_on_them_train_as_loaded_ones():
    model, clip = small("sd1")
    with torch.inference_mode():
        with in_fp32(model, clip, width=PIXELS, height=PIXELS) as denoiser:
            data = build(denoiser)
            delta = train(denoiser, data, TrainSettings(**{**vars(SETTINGS), "learning_rate": 1e-2})).delta
        edited, _ = patched(model, clip, delta)
        with in_fp32(edited, clip, width=PIXELS, height=PIXELS) as denoiser:
            expected = first_step(denoiser, data)
            edited.unpatch_model(CPU)
            # what ComfyUI does where memory is short: weights stay where they are and are patched on their way in
            edited.load(CPU, lowvram_model_memory=1)
            assert edited.model.lowvram_patch_counter == len(delta.layers)
            found = first_step(denoiser, data)
            edited.unpatch_model(CPU)
            unpatched = first_step(denoiser, data)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert torch.cosine_similarity(unpatched, expected, dim=0) < 0.9999


def test_checkpointing_runs_patches_in_the_block_that_they_are_for():
    model, clip = small("sd1")
    model = model.clone()

    def double_in_first_input_block(given, options):
        return given * 2 if options["block"] == ("input", 1) else given

    model.set_model_attn1_output_patch(double_in_first_input_block)
    with torch.inference_mode(), in_fp32(model, clip, width=PIXELS, height=PIXELS) as denoiser:
        data, calls = build(denoiser), []
        with (
            denoiser.network.middle_block[0]
            .in_layers[0]
            .register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        ):
            plain = first_step(denoiser, data)
            with denoiser.checkpointed():
                torch.testing.assert_close(first_step(denoiser, data), plain, rtol=1e-4, atol=1e-7)
    # one step, then another, in whose backward pass the block runs again
    assert calls.count(True) == 1 + 2


def test_the_fingerprint_ignores_what_comfyui_leaves_uninitialized():
    model, clip = small("sd1")
    seen = []
    for number in (0.0, float("nan"), 3.0):
        with torch.inference_mode(), opened(model, clip) as denoiser:
            clip.cond_stage_model.clip_l.transformer.text_projection.weight.fill_(number)
            seen.append(denoiser.fingerprint())
    with torch.inference_mode(), opened(model, clip) as denoiser:
        next(iter(denoiser.layers.values())).weight.mul_(2)
        assert len(set(seen)) == 1 and denoiser.fingerprint() != seen[0]


def test_loading_again_within_the_block_keeps_gradients_possible():
    model, clip = small("sd1")
    with torch.inference_mode(), opened(model, clip, width=PIXELS, height=PIXELS) as denoiser:
        data = build(denoiser)
        with torch.inference_mode():
            model_management.unload_all_models()
            model.model.to(torch.float64).to(torch.float32)
        denoiser.vae._reload()
        assert np.isfinite(train(denoiser, data, SETTINGS).losses).all()


def test_weights_stay_in_the_memory_that_comfyui_knows():
    model, clip = small("sd1")
    before = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    assert all(weight.is_inference() for weight in model.model.parameters())
    with torch.inference_mode(), opened(model, clip):
        assert not any(weight.is_inference() for weight in model.model.parameters())
        assert {name: weight.data_ptr() for name, weight in model.model.named_parameters()} == before
