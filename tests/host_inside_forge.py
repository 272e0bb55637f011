"""Tests of the Forge host on Forge's real classes, collected by `test_webui.py` only.

Models are loaded by Forge's own loader, in inference mode. The diffusers host is the reference.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import networks
import pytest
import torch
from backend.diffusion_engine.base import ForgeObjects
from backend.loader import forge_loader
from backend.patcher.lora import model_lora_keys_clip, model_lora_keys_unet
from modules import sd_models

from concept_ablation.core import dataset, delta_file
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError, IncompatibleDelta, Interrupted
from concept_ablation.core.hosts import webui
from concept_ablation.core.hosts.diffusers import load_denoiser
from concept_ablation.core.hosts.webui import architecture_of, opened, patched, require_plain
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings, train

FISH = Concept("tropical fish", "fish")
SMALL = DatasetSettings(images=4, preserve=0, prompts=2, sample=SampleSettings(steps=3), batch=4)
TRAIN = TrainSettings(steps=2, batch=2, preserve_batch=0, learning_rate=1e-5)
TOKEN_EMBEDDING = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Pictures of 64 pixels, computed in fp32 also where the hardware is fast at bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webui, "native_size", lambda *_: 64)
        patch.setattr(webui, "autocast_dtype", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def path():
    return next(iter(sd_models.checkpoints_list.values())).filename


@pytest.fixture(scope="module")
def engine(path):
    return forge_loader(path)


@pytest.fixture(scope="module")
def reference(path):
    return load_denoiser(path, device="cpu", precision="fp32")


@pytest.fixture
def ours(engine):
    with opened(engine) as denoiser:
        yield denoiser


@pytest.fixture(scope="module")
def data(engine):
    with opened(engine) as denoiser:
        return dataset.build(denoiser, [FISH], SMALL)


def weight_hash(engine) -> str:
    digest = hashlib.sha256()
    objects = engine.forge_objects_original
    for module in (objects.unet.model, objects.clip.cond_stage_model, objects.vae.first_stage_model):
        for name, value in module.state_dict().items():
            # Forge itself widens the embeddings when it first encodes a prompt
            value = value.float() if ".embeddings." in name else value
            digest.update(name.encode() + value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_delta(denoiser, pattern: str = "attn2_to_", size: float = 0.05) -> Delta:
    rng = torch.Generator().manual_seed(0)
    modules = {name: module for name, module in denoiser.layers.items() if pattern in name}
    return Delta(
        {name: LayerDelta(size * torch.randn(module.weight.shape, generator=rng)) for name, module in modules.items()}
    )


def predicted(denoiser) -> torch.Tensor:
    noise = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    sigma = denoiser.sigmas[[300, 900]]
    x = denoiser.add_noise(torch.zeros_like(noise), noise, sigma)
    return denoiser.denoise(x, sigma, denoiser.encode(["a tropical fish", "a rose"]))


# --- The same model as the diffusers host -----------------------------------------------------------------------------


def test_predictions_conditioning_and_images_are_those_of_the_diffusers_host(ours, reference):
    prompts = ["a tropical fish", "a rose by flat on a blue background"]
    torch.testing.assert_close(ours.encode(prompts).context, reference.encode(prompts).context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.sigmas, reference.sigmas, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted(ours), predicted_by(reference), atol=1e-4, rtol=1e-4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours.vae.decode(latents), reference.vae.decode(latents), atol=1e-4, rtol=1e-4)
    assert ours.tokenize("grumpy cat") == reference.tokenize("grumpy cat")
    assert ours.architecture == reference.architecture == "sd1"
    assert ours.latent_shape == (4, 8, 8)


def predicted_by(reference) -> torch.Tensor:
    """The same as `predicted`, at the size of our latents."""
    names = ("sigmas", "encode", "denoise", "add_noise")
    return predicted(SimpleNamespace(latent_shape=(4, 8, 8), **{name: getattr(reference, name) for name in names}))


def test_every_layer_has_the_diffusers_hosts_name_and_weights(ours, reference):
    for name, module in ours.layers.items():
        assert torch.equal(module.weight.float(), reference.layers[name].weight), name
    # the rest has no name that Forge's loader knows
    assert all(name.startswith(("lora_te", "text_encoders")) for name in set(reference.layers) - set(ours.layers))


def test_every_layer_is_a_key_of_forges_lora_loader(engine, ours):
    objects = engine.forge_objects_original
    keys = model_lora_keys_clip(objects.clip.cond_stage_model, model_lora_keys_unet(objects.unet.model, {}))
    names = {module: name for part in (objects.unet.model, ours.text_network) for name, module in part.named_modules()}
    assert len(ours.layers) > 200
    for name, module in ours.layers.items():
        assert keys[name] == f"{names[module]}.weight"


@pytest.mark.parametrize(("subset", "rate"), [("cross-attn", 1e-5), ("full", 1e-6)])
def test_training_gives_the_delta_of_the_diffusers_host(ours, reference, data, subset, rate):
    settings = replace(TRAIN, subset=subset, learning_rate=rate)
    mine, theirs = train(ours, data, settings), train(reference, data, settings)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-3)
    agreeing = total = 0
    for name, layer in theirs.delta.layers.items():
        for found, expected in zip(mine.delta.layers[name].tensors(), layer.tensors(), strict=True):
            close = torch.isclose(found, expected, atol=rate / 20, rtol=1e-2)
            agreeing, total = agreeing + int(close.sum()), total + close.numel()
    # Adam's first steps are the sign of the gradient, which rounding decides where it is almost nothing
    assert agreeing / total > 0.999


def test_the_loss_falls(ours, data):
    settings = replace(TRAIN, steps=12)
    moving, still = train(ours, data, settings).losses, train(ours, data, replace(settings, learning_rate=1e-12)).losses
    # the same batches, noise and levels, so the losses can be compared one by one
    assert moving[0] == pytest.approx(still[0])
    assert sum(moving[6:]) < 0.6 * sum(still[6:])


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


def test_a_dataset_on_disk_is_drawn_once(ours, tmp_path):
    # Forge replaces safetensors' loader by one that raises other errors
    first = dataset.build(ours, [FISH], replace(SMALL, images=2, batch=2), directory=tmp_path)
    again = dataset.build(ours, [FISH], replace(SMALL, images=2, batch=2), directory=tmp_path)
    assert torch.equal(first.latents, again.latents)


# --- The model that the user goes on with -----------------------------------------------------------------------------


def test_the_model_is_as_it_was_after_success_interrupt_and_error(engine, data):
    before, objects = weight_hash(engine), engine.forge_objects
    modules = [*objects.unet.model.modules(), *objects.clip.cond_stage_model.modules()]
    classes = [type(module) for module in modules]

    def interrupt(progress):
        raise Interrupted("stop")

    with opened(engine) as denoiser:
        train(denoiser, data, TRAIN)
    with pytest.raises(Interrupted), opened(engine) as denoiser:
        train(denoiser, data, TRAIN, interrupt)
    with pytest.raises(AblationError), opened(engine) as denoiser:
        train(denoiser, data, replace(TRAIN, learning_rate=1e3, steps=10))
    with pytest.raises(RuntimeError), opened(engine) as denoiser:
        denoiser.denoise(torch.zeros(1, 5, 8, 8), torch.ones(1), denoiser.encode(["a fish"]))
    assert weight_hash(engine) == before
    assert [type(module) for module in modules] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert engine.forge_objects is objects
    # and Forge itself still works
    assert torch.isfinite(engine.get_learned_conditioning(["a fish"])).all()


def test_clip_skip_and_emphasis_are_part_of_the_model(engine):
    with opened(engine) as denoiser:
        plain, weighted = denoiser.fingerprint(), denoiser.encode(["a (red:1.3) fish", "a red fish"]).context
    assert not torch.allclose(weighted[0], weighted[1])
    engine.set_clip_skip(2)
    try:
        with opened(engine) as denoiser:
            assert denoiser.fingerprint() != plain
    finally:
        engine.set_clip_skip(1)
    with opened(engine) as denoiser:
        assert denoiser.fingerprint() == plain


# --- Deltas in Forge's own hands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["attn2_to_", "lora_unet_", "lora_te_"])
def test_forges_lora_loader_takes_the_whole_file_and_does_what_hooks_do(engine, tmp_path, capsys, pattern):
    with opened(engine) as denoiser:
        delta = random_delta(denoiser, pattern, 0.02).rounded(torch.float16)
        plain = predicted(denoiser)
        with delta.attach(denoiser):
            hooked = predicted(denoiser)
    path = tmp_path / "delta.safetensors"
    delta_file.save(delta, path)
    original = engine.forge_objects_original
    capsys.readouterr()
    sd = networks.load_lora_state_dict(str(path))
    unet, clip = networks.load_lora_for_models(original.unet, original.clip, sd, 1.0, 1.0, filename=str(path))
    told = capsys.readouterr().out
    assert "unmatched" not in told and "ismatch" not in told and "(skipped 0 keys)" in told
    assert f"with {len(delta.layers)} keys" in told
    with opened(engine, ForgeObjects(unet, clip, original.vae, None)) as denoiser:
        loaded = predicted(denoiser)
    change = (hooked - plain).abs().max()
    assert change > 0.05
    # Forge rounds the edited weights of the text encoder to fp16
    assert (loaded - hooked).abs().max() < 0.01 * change
    with opened(engine) as denoiser:
        assert torch.equal(predicted(denoiser), plain)


def test_our_patches_are_those_of_forges_lora_loader(engine):
    original = engine.forge_objects_original
    with opened(engine) as denoiser:
        delta, plain = random_delta(denoiser), predicted(denoiser)
        with delta.attach(denoiser, 0.5):
            hooked = predicted(denoiser)
    unet, clip = patched(original.unet, original.clip, delta, 0.5)
    with opened(engine, ForgeObjects(unet, clip, original.vae, None)) as denoiser:
        torch.testing.assert_close(predicted(denoiser), hooked, atol=1e-4, rtol=1e-4)
    assert not original.unet.lora_patches and not torch.allclose(hooked, plain, atol=1e-3)


def test_patches_that_forge_adds_in_every_forward_pass_take_part_in_training(engine, data):
    original = engine.forge_objects_original
    with opened(engine) as denoiser:
        delta, plain = random_delta(denoiser), train(denoiser, data, TRAIN).losses
    tensors = delta_file.to_tensors(delta)
    losses = {}
    for online in (False, True):
        unet, clip = networks.load_lora_for_models(original.unet, original.clip, tensors, 1, 1, online_mode=online)
        with opened(engine, ForgeObjects(unet, clip, original.vae, None)) as denoiser:
            losses[online] = train(denoiser, data, TRAIN).losses
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True] != pytest.approx(plain, rel=1e-3)


def test_a_delta_of_another_model_is_refused_in_one_sentence(engine, ours):
    original = engine.forge_objects_original
    name, module = next((n, m) for n, m in ours.layers.items() if n.endswith("attn2_to_k"))
    wide = Delta({name: LayerDelta(torch.zeros(module.weight.shape[0] + 1, module.weight.shape[1]))})
    with pytest.raises(IncompatibleDelta, match="has the shape"):
        patched(original.unet, original.clip, wide)
    unknown = Delta({"lora_unet_no_such_layer": LayerDelta(torch.zeros(2, 2))})
    with pytest.raises(IncompatibleDelta, match="does not have, first lora_unet_no_such_layer"):
        patched(original.unet, original.clip, unknown)
    embedding = Delta({TOKEN_EMBEDDING: LayerDelta(torch.zeros(49408, 768))})
    with pytest.raises(IncompatibleDelta, match="no place for an edit of the token embedding"):
        patched(original.unet, original.clip, embedding)


def test_a_linear_delta_fits_the_convolution_that_does_the_same(engine, ours):
    original = engine.forge_objects_original
    name = next(n for n, m in ours.layers.items() if n.endswith("proj_in") and m.weight.dim() == 4)
    flat = Delta({name: LayerDelta(torch.ones(ours.layers[name].weight.shape[:2]))})
    unet, _ = patched(original.unet, original.clip, flat)
    (patches,) = unet.lora_patches.values()
    ((patch,),) = patches.values()
    assert patch[1][1][0].shape == ours.layers[name].weight.shape


# --- What is refused --------------------------------------------------------------------------------------------------


def test_the_embedding_subset_is_refused_because_forge_cannot_load_it(ours, data):
    with pytest.raises(AblationError, match="no layers of the subset 'embedding'"):
        train(ours, data, replace(TRAIN, subset="embedding"))


@pytest.mark.parametrize("storage", ["nf4", "gguf"])
def test_packed_weights_are_refused(storage):
    with pytest.raises(AblationError, match="Diffusion in Low Bits"):
        require_plain(SimpleNamespace(storage_dtype=storage))


def test_other_models_are_refused(engine):
    with pytest.raises(AblationError, match="is a SimpleNamespace"):
        architecture_of(SimpleNamespace())
    config = engine.forge_objects.unet.model.diffusion_model.config
    config["in_channels"] = 9
    try:
        with pytest.raises(AblationError, match="not an inpainting"), opened(engine):
            pass
    finally:
        config["in_channels"] = 4
