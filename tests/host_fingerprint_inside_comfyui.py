"""What makes another model of the same checkpoint, and what cannot be trained; collected by `test_nodes.py` only."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import comfy.ops
import pytest
import torch

from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.comfy_emoji import load_emoji_diffusion
from concept_ablation.core.hosts.comfyui import ComfyDenoiser, opened, require_trainable


@pytest.fixture(scope="module")
def emoji():
    with torch.inference_mode():
        return load_emoji_diffusion()


def test_what_other_nodes_change_beside_the_weights_makes_another_model(emoji):
    model, clip, _ = emoji
    skipped = clip.clone()
    skipped.clip_layer(-2)
    with torch.inference_mode():
        with opened(model, clip) as denoiser:
            plain = denoiser.fingerprint()
        with opened(model, skipped) as denoiser:
            assert denoiser.fingerprint() != plain
        with opened(model, clip) as denoiser:
            assert denoiser.fingerprint() == plain


def test_a_lora_makes_another_model_wherever_comfyui_keeps_it(emoji):
    """Loaded to the device it is in the weights; of offloaded layers it stays beside them."""
    model, clip, _ = emoji
    weights = model.model.state_dict()
    patches = {key: ("diff", (torch.full_like(weights[key], 0.01),)) for key in weights if key.endswith("to_k.weight")}
    seen = {}
    for strength in (0.0, 0.5, 1.0):
        for offloaded in (False, True):
            other = model.clone()
            if strength:
                other.add_patches(patches, strength)
            with torch.inference_mode():
                other.load(other.load_device, lowvram_model_memory=int(offloaded), full_load=not offloaded)
                assert bool(other.backup) == (strength > 0 and not offloaded)
                denoiser = ComfyDenoiser(other, clip, None, (16, 16), 0)
                seen[strength, offloaded] = denoiser.fingerprint()
                other.unpatch_model(other.offload_device)
    assert all(seen[strength, False] == seen[strength, True] for strength in (0.0, 0.5, 1.0))
    assert len(set(seen.values())) == 3


def test_a_patch_of_the_attention_makes_another_model(emoji):
    model, clip, _ = emoji

    def scaled(factor):
        other = model.clone()
        other.set_model_attn1_output_patch(lambda out, extra_options: out * factor)
        return other

    seen = []
    with torch.inference_mode():
        for one in (model, scaled(0.5), scaled(2.0), scaled(0.5)):
            with opened(one, clip) as denoiser:
                seen.append(denoiser.fingerprint())
    assert seen[1] == seen[3] and len(set(seen)) == 3


def test_an_attention_counts_that_the_user_chose_and_not_the_one_that_we_put_in(emoji):
    model, clip, _ = emoji
    chosen = model.clone()
    chosen.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *q, **options: 0
    told = []
    for one in (model, chosen):
        with torch.inference_mode(), opened(one, clip) as denoiser:
            told.append(str(denoiser._beside()))
    # ours names this package's module, and with it in ComfyUI where it is installed
    assert "with_gradients" not in told[0]
    assert told[0] != told[1]


@pytest.mark.parametrize("fast", [True, False])
def test_fp8_products_are_not_trained_through(fast):
    kind = comfy.ops.fp8_ops if fast else comfy.ops.manual_cast
    network = torch.nn.ModuleList([kind.Linear(2, 2)])
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=network))
    with pytest.raises(AblationError, match="fp8 matrix multiplication") if fast else nullcontext():
        require_trainable(model)
