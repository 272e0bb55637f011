"""Loading models: folders, single files, and one clear sentence for everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from concept_ablation.core.concept import Concept
from concept_ablation.core.errors import AblationError
from concept_ablation.core.hosts.diffusers import EMBEDDED_MODEL, DiffusersDenoiser, Parts, load_denoiser
from concept_ablation.core.hosts.single_file import write_single_file
from concept_ablation.core.prompts import BUILT_IN
from concept_ablation.core.samplers import SampleSettings, sample_latents
from concept_ablation.core.subsets import empty_delta, select, trainable

UNET = "unet/diffusion_pytorch_model.safetensors"
DRAW = (["a cat", "a red apple"], [1, 2], SampleSettings(3))


@pytest.fixture(scope="session")
def saved(make_model, tmp_path_factory) -> Path:
    """A random model as diffusers saves it."""
    model, folder = make_model(), tmp_path_factory.mktemp("saved") / "little"
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=model.vae._vae,
        text_encoder=model.text_network,
        tokenizer=model._tokenizer,
        unet=model.network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "little"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_a_folder_comes_back_as_it_went(saved, tiny):
    loaded = load_denoiser(str(saved), device="cpu", precision="fp32")
    assert loaded.name == "little" and loaded.architecture == "sd1" and loaded.latent_shape == (4, 8, 8)
    assert loaded.fingerprint() == tiny.fingerprint() and loaded.layers.keys() == tiny.layers.keys()
    torch.testing.assert_close(loaded.sigmas, tiny.sigmas)
    assert torch.equal(sample_latents(loaded, *DRAW), sample_latents(tiny, *DRAW))
    assert loaded.prompt_source is BUILT_IN and loaded.learning_rate_scale == 1.0


def test_nothing_that_is_loaded_is_trainable(saved):
    loaded = load_denoiser(str(saved))
    parts = (loaded.network, loaded.text_network, loaded.vae._vae)
    assert not any(part.training for part in parts)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_the_embedded_model_is_the_default_and_brings_its_prompts_and_hints(emoji):
    assert emoji.name == "emoji_diffusion" and emoji.latent_shape == (4, 16, 16)
    assert emoji.prompt_source != BUILT_IN and "{} emoji" in emoji.prompt_source.instance_train
    hints = json.loads((EMBEDDED_MODEL / "ablation_hints.json").read_text("utf-8"))
    assert emoji.learning_rate_scale == hints["learning_rate_scale"] != 1.0
    assert emoji.learning_rate_scales == hints["learning_rate_scales"] != {}


def test_a_folder_in_half_precision_is_computed_in_the_chosen_one(folder, tiny):
    for name in (UNET, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        save_file(
            {key: value.half() for key, value in load_file(folder / name).items()}, folder / name, {"format": "pt"}
        )
    loaded = load_denoiser(str(folder), device="cpu", precision="fp32")
    assert {p.dtype for part in (loaded.network, loaded.text_network) for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(sample_latents(loaded, *DRAW), sample_latents(tiny, *DRAW), rtol=0.02, atol=0.02)
    coarse = sample_latents(load_denoiser(str(folder), device="cpu", precision="bf16"), *DRAW)
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, sample_latents(loaded, *DRAW))
    torch.testing.assert_close(coarse, sample_latents(loaded, *DRAW), rtol=0.1, atol=0.5)


def test_normalizations_under_bf16_are_computed_in_fp32(folder):
    plain, fast = (load_denoiser(str(folder), device="cpu", precision=name).network for name in ("fp32", "bf16"))
    x = torch.randn(2, plain.conv_norm_out.num_channels, 8, 8).to(torch.bfloat16)
    expected = plain.conv_norm_out(x.float())
    with torch.no_grad():
        found = fast.conv_norm_out(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.to(torch.bfloat16), rtol=0, atol=0)
    assert [*fast.state_dict()] == [*plain.state_dict()]


def test_a_single_file_draws_what_the_folder_draws(emoji, tmp_path):
    path = tmp_path / "emoji.safetensors"
    write_single_file(path, emoji.network, emoji.text_network, emoji.vae._vae)
    loaded = load_denoiser(str(path), device="cpu")
    assert loaded.name == "emoji" and loaded.architecture == "sd1" and loaded.latent_shape == emoji.latent_shape
    assert loaded.fingerprint() == emoji.fingerprint() and loaded.layers.keys() == emoji.layers.keys()
    # a file has no scheduler: Stable Diffusion's own
    torch.testing.assert_close(loaded.sigmas, emoji.sigmas)
    drawn, expected = sample_latents(loaded, *DRAW), sample_latents(emoji, *DRAW)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.vae.decode(drawn), emoji.vae.decode(drawn), rtol=0, atol=1e-3)
    torch.testing.assert_close(loaded.vae.encode(torch.ones(1, 3, 64, 64)), emoji.vae.encode(torch.ones(1, 3, 64, 64)))


def test_the_tokenizer_that_stable_diffusion_ships_is_read(folder, tiny):
    """Its repositories have vocab.json and merges.txt and no tokenizer.json."""
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    loaded = load_denoiser(str(folder))
    with torch.no_grad():
        for prompt in ("a photo of a Grumpy Cat, 4k", "“日本” café"):
            assert loaded.tokenize(prompt) == tiny.tokenize(prompt)
            assert torch.equal(loaded.encode([prompt]).context, tiny.encode([prompt]).context)


def test_the_prediction_type_is_the_folders_unless_it_is_given(folder, make_model):
    epsilon, velocity = (make_model(prediction_type=name) for name in ("epsilon", "v_prediction"))
    assert epsilon.fingerprint() == velocity.fingerprint() and epsilon.setup() != velocity.setup()
    expected = [sample_latents(model, *DRAW) for model in (epsilon, velocity)]
    assert not torch.allclose(*expected, atol=0.1)
    given = load_denoiser(str(folder), precision="fp32", prediction_type="v_prediction")
    assert torch.equal(sample_latents(given, *DRAW), expected[1])
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert torch.equal(sample_latents(load_denoiser(str(folder), precision="fp32"), *DRAW), expected[1])
    given = load_denoiser(str(folder), precision="fp32", prediction_type="epsilon")
    assert torch.equal(sample_latents(given, *DRAW), expected[0])


def refusal(model: object, **options: str) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(AblationError) as refused:
        load_denoiser(str(model), **options)
    sentence = str(refused.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all.safetensors", ""])
def test_a_missing_path(name, tmp_path):
    path = tmp_path / name / "missing"
    assert refusal(path).startswith(f"There is no model at {path}: give a diffusers folder")


def test_a_name_that_is_neither_path_nor_hub_id():
    assert refusal("dreamshaper").startswith("There is no model at dreamshaper: give")


def test_a_hub_id_without_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sentence = refusal("nobody-at-all/no-such-model")
    assert sentence.startswith("Cannot load the model nobody-at-all/no-such-model (")
    assert sentence.endswith("check the name and the network, or give a local folder.")


def test_a_folder_that_is_no_pipeline(folder):
    assert "unet has no model_index.json: give the top folder" in refusal(folder / "unet")


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_another_architecture(name, folder):
    change(folder / "model_index.json", _class_name=name)
    assert f"holds a {name}: only StableDiffusionPipeline" in refusal(folder)


def test_a_pickled_checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04")
    assert "model.ckpt is a pickle" in refusal(path)


def test_pickled_weights_in_a_folder(folder):
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.safetensors" in refusal(folder)


def test_unknown_precision(saved):
    assert refusal(saved, precision="fp8") == "There is no precision 'fp8': choose one of auto, fp32, bf16, fp16."


def test_unknown_prediction_type(saved, folder):
    assert "predicts 'sample': only epsilon and v_prediction" in refusal(saved, prediction_type="sample")
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    assert "predicts 'flow_prediction'" in refusal(folder)


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(device, saved):
    assert device.split(":")[0] in refusal(saved, device=device)


@pytest.mark.parametrize("damage", ["truncated", "junk", "removed"])
@pytest.mark.parametrize("name", [UNET, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_damaged_weights(name, damage, folder):
    path = folder / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "truncated" else b"junk" * 100)
    sentence = refusal(folder)
    assert sentence.startswith(f"Cannot load the model {folder} (") and sentence.endswith("check the folder.")


SETTINGS = """model_index.json unet/config.json text_encoder/config.json vae/config.json prompts.json
scheduler/scheduler_config.json tokenizer/tokenizer.json ablation_hints.json"""


@pytest.mark.parametrize("name", SETTINGS.split())
def test_damaged_settings(name, folder):
    (folder / name).write_text("junk", "utf-8")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"_class_name": null}'])
def test_an_index_without_a_class(text, folder):
    (folder / "model_index.json").write_text(text, "utf-8")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(part, folder):
    shutil.rmtree(folder / part)
    assert str(folder) in refusal(folder)


def test_a_tokenizer_without_its_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert str(folder) in refusal(folder)


def test_a_tokenizer_without_its_settings_still_fits_the_text_encoder(folder, tiny):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    loaded = load_denoiser(str(folder))
    with torch.no_grad():
        assert torch.equal(loaded.encode(["a grumpy cat"]).context, tiny.encode(["a grumpy cat"]).context)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet/config.json", {"block_out_channels": [64, 64]}),
        ("unet/config.json", {"cross_attention_dim": 32}),
        ("text_encoder/config.json", {"hidden_size": 32}),
        ("vae/config.json", {"encoder_block_out_channels": [16, 16]}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "banana"}),
        ("ablation_hints.json", {"learning_rate_scale": "fast"}),
        ("ablation_hints.json", {"learning_rate_scale": 2, "learning_rate_scales": {"full": "fast"}}),
        ("ablation_hints.json", {"other": 1}),
    ],
)
def test_settings_that_do_not_fit(name, values, folder):
    if not (folder / name).is_file():
        (folder / name).write_text("{}", "utf-8")
    change(folder / name, **values)
    assert str(folder) in refusal(folder)


def test_the_text_encoder_of_sd2_is_named_as_comfyui_names_it(make_model):
    parts = make_model()
    network = UNet2DConditionModel.from_config(parts.network.config, cross_attention_dim=1024)
    schedule = {"beta_schedule": "scaled_linear"}
    model = DiffusersDenoiser(
        Parts(network, parts.text_network, parts._tokenizer, parts.vae._vae, schedule), "x", torch.device("cpu"), None
    )
    tables = [select("embedding", one) for one in (model, parts)]
    assert [[name.split(".")[1] for name in table] for table in tables] == [["clip_h"], ["clip_l"]]


def test_an_inpainting_network_is_refused(make_model):
    parts = make_model()
    network = UNet2DConditionModel.from_config(parts.network.config, in_channels=9)
    with pytest.raises(AblationError, match="not an inpainting"):
        DiffusersDenoiser(
            Parts(network, parts.text_network, parts._tokenizer, parts.vae._vae, {}), "x", torch.device("cpu"), None
        )


def test_weights_in_fp16_take_nothing_from_the_gradients(make_model):
    """As on a GPU: the weights in fp16, the arithmetic in bf16, which has the range of fp32."""
    model = make_model()
    x, sigma, cond = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), model.encode(["a cat"])

    def gradients() -> list[torch.Tensor]:
        delta = trainable(empty_delta("cross-attn", model, [Concept("grumpy cat", "cat")]), "cross-attn")
        with torch.enable_grad(), delta.attach(model):
            (model.denoise(x, sigma, cond).mean() * 1e-6).backward()
        return [layer.weight.grad for layer in delta.layers.values()]

    expected = gradients()
    for module in model.network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.half()
    model._autocast = torch.bfloat16
    for found, exact in zip(gradients(), expected, strict=True):
        assert 0 < exact.abs().max() < 1e-6, "what fp16 can hardly hold"
        assert (found - exact).norm() < 0.1 * exact.norm()
