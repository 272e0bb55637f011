"""Deltas: the hook's arithmetic, gradients, exactness when disabled, merging and low rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from concept_ablation.core.delta import (
    Delta,
    LayerDelta,
    LowRank,
    contribution,
    merge,
    to_lora,
    zeros,
    zeros_in_rows,
)
from concept_ablation.core.errors import AblationError, IncompatibleDelta
from concept_ablation.core.subsets import select

LAYERS = {
    "linear": (nn.Linear(5, 7), (3, 5)),
    "linear without bias": (nn.Linear(5, 7, bias=False), (3, 5)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "grouped conv": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "circular conv": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
    "group norm": (nn.GroupNorm(2, 8), (2, 8, 5, 5)),
    "layer norm": (nn.LayerNorm(8), (2, 3, 8)),
}


def random_like(layer: nn.Module) -> LayerDelta:
    bias = getattr(layer, "bias", None)
    return LayerDelta(torch.randn_like(layer.weight), None if bias is None else torch.randn_like(bias))


@pytest.mark.parametrize("name", LAYERS)
def test_contribution_is_what_changed_weights_would_add(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    x, change = torch.randn(shape), random_like(layer)
    edited = copy.deepcopy(layer)
    with torch.no_grad():
        edited.weight += change.weight
        if change.bias is not None:
            edited.bias += change.bias
    torch.testing.assert_close(layer(x) + contribution(layer, x, change), edited(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv", "grouped conv"])
def test_low_rank_equals_its_dense_form(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(2)
    x = torch.randn(shape)
    low = LowRank(torch.randn(layer.weight.shape[0], 2), torch.randn(2, *layer.weight.shape[1:]))
    bias = torch.randn_like(layer.bias)
    dense = contribution(layer, x, LayerDelta(low.dense(), bias))
    torch.testing.assert_close(contribution(layer, x, LayerDelta(low, bias)), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(LayerDelta(low).squared_norm(), low.dense().square().sum(), rtol=1e-4, atol=1e-4)


def test_a_bias_is_added_where_the_input_is_not_where_an_offloaded_weight_is():
    offloaded = nn.Conv2d(4, 6, 3, device="meta")
    bias = torch.arange(6.0)
    added = contribution(offloaded, torch.randn(1, 4, 5, 5), LayerDelta(None, bias))
    assert torch.equal(added, bias[None, :, None, None].expand(1, 6, 3, 3))


def test_embedding_rows_move_only_their_tokens():
    embedding = nn.Embedding(11, 4)
    change = zeros_in_rows("e", embedding, [7, 3, 7]).layers["e"]
    assert change.weight.shape == (11, 4) and change.weight.down.shape == (2, 4)
    change.weight.down[:] = torch.tensor([[1.0] * 4, [2.0] * 4])
    added = contribution(embedding, torch.tensor([[0, 3, 7, 3]]), change)
    assert added[0, :, 0].tolist() == [0.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_a_change_is_cast_once_and_again_when_it_or_the_type_changes(tiny, layer, monkeypatch):
    tiny.layers = {"layer": layer.requires_grad_(False)}
    torch.manual_seed(3)
    change = random_like(layer)
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    expected = contribution(layer, x, change)
    used = []
    monkeypatch.setattr(
        "concept_ablation.core.delta.contribution", lambda *given: used.append(given[2]) or contribution(*given)
    )
    bf16 = torch.autocast("cpu", torch.bfloat16)
    with bf16:
        plain = layer(x).float()
    with Delta({"layer": change}).attach(tiny):
        with bf16:
            first = layer(x)
            assert first.dtype == torch.bfloat16 and torch.equal(layer(x), first) and used[0] is used[1]
            torch.testing.assert_close(first.float() - plain, expected, atol=0.1, rtol=0.02)
            change.weight.mul_(2)
            change.bias.mul_(2)
            torch.testing.assert_close(layer(x).float() - plain, 2 * expected, atol=0.1, rtol=0.02)
        exact = layer(x)
        assert exact.dtype == torch.float32
        with torch.inference_mode():
            layer(x)
        # what was made without gradients does not get in their way
        wanted = x.clone().requires_grad_(True)
        layer(wanted).sum().backward()
        assert wanted.grad is not None


def test_a_layer_that_cannot_be_edited_is_refused():
    with pytest.raises(TypeError, match="Bilinear"):
        contribution(nn.Bilinear(2, 2, 2), torch.zeros(1, 2), LayerDelta(torch.zeros(2, 2, 2)))


@pytest.mark.parametrize("subset", ["cross-attn", "attn", "full"])
def test_gradient_of_the_delta_is_the_gradient_of_the_real_weight(tiny, subset):
    """d loss / d delta at delta = 0, against autograd through the weights themselves, for every layer of the subset."""
    torch.manual_seed(0)
    x, sigma = torch.randn(2, *tiny.latent_shape), torch.tensor([0.7, 5.0])
    with torch.no_grad():
        cond = tiny.encode(["a cat", "a tropical fish"])
    aim = torch.randn_like(x)

    delta = zeros(select(subset, tiny)).map(lambda tensor: tensor.requires_grad_(True))
    with delta.attach(tiny):
        (tiny.direction(x, sigma, cond) - aim).square().mean().backward()

    modules = {module: name for name, module in tiny.layers.items()}
    weights = {
        name: parameter.detach().clone().requires_grad_(True) for name, parameter in tiny.network.named_parameters()
    }
    network, tiny.network = tiny.network, lambda *a, **k: functional_call(network, weights, a, k)
    tiny.network.dtype = network.dtype
    (tiny.direction(x, sigma, cond) - aim).square().mean().backward()
    checked = 0
    for name, module in network.named_modules():
        if module not in modules or modules[module] not in delta.layers:
            continue
        layer = delta.layers[modules[module]]
        for suffix, change in (("weight", layer.weight), ("bias", layer.bias)):
            if change is not None:
                torch.testing.assert_close(change.grad, weights[f"{name}.{suffix}"].grad, rtol=2e-3, atol=1e-6)
                checked += 1
    assert checked == sum(len(layer.tensors()) for layer in delta.layers.values()) > 0


def test_gradient_of_embedding_rows_is_the_gradient_of_the_real_rows(tiny):
    name = next(name for name in tiny.layers if name.endswith("token_embedding"))
    rows = sorted(set(tiny.tokenize("tropical fish")))
    delta = zeros_in_rows(name, tiny.layers[name], rows)
    delta.layers[name].weight.down.requires_grad_(True)
    with delta.attach(tiny):
        tiny.encode(["a tropical fish"]).context.square().sum().backward()
    weight = tiny.layers[name].weight.requires_grad_(True)
    tiny.encode(["a tropical fish"]).context.square().sum().backward()
    torch.testing.assert_close(delta.layers[name].weight.down.grad, weight.grad[rows])
    assert weight.grad[rows].abs().min() > 0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_disabled_and_detached_are_identical_to_the_last_bit(tiny, autocast):
    tiny._autocast = autocast
    torch.manual_seed(0)
    x, sigma, cond = torch.randn(2, *tiny.latent_shape), torch.tensor([0.7, 5.0]), tiny.encode(["a", "b"])
    delta = zeros(select("full", tiny)).map(torch.randn_like)
    fingerprint = tiny.fingerprint()
    with torch.no_grad():
        original = tiny.denoise(x, sigma, cond)
        with delta.attach(tiny) as attachment:
            edited = tiny.denoise(x, sigma, cond)
            with attachment.disabled():
                assert torch.equal(tiny.denoise(x, sigma, cond), original)
            assert torch.equal(tiny.denoise(x, sigma, cond), edited)
            attachment.strength = 0.0
            assert torch.equal(tiny.denoise(x, sigma, cond), original)
        assert torch.equal(tiny.denoise(x, sigma, cond), original)
        assert not torch.allclose(edited, original, atol=0.1)
    assert tiny.fingerprint() == fingerprint


def test_disabled_ends_with_its_block_even_after_an_exception(tiny):
    delta = zeros(select("cross-attn", tiny)).map(torch.ones_like)
    x, sigma, cond = torch.randn(1, *tiny.latent_shape), torch.tensor([1.0]), tiny.encode(["a"])
    with torch.no_grad(), delta.attach(tiny) as attachment:
        edited = tiny.denoise(x, sigma, cond)
        with pytest.raises(RuntimeError, match="inside"), attachment.disabled():
            raise RuntimeError("inside")
        assert torch.equal(tiny.denoise(x, sigma, cond), edited)


def test_strength_scales_and_attachments_add(tiny):
    layers = select("cross-attn", tiny)
    torch.manual_seed(0)
    one, two = (zeros(layers).map(lambda tensor: 0.1 * torch.randn_like(tensor)) for _ in range(2))
    x, sigma, cond = torch.randn(1, *tiny.latent_shape), torch.tensor([1.0]), tiny.encode(["a cat"])
    with torch.no_grad():
        with one.attach(tiny, 0.5), two.attach(tiny, -2.0):
            apart = tiny.denoise(x, sigma, cond)
        with merge([(one, 0.5), (two, -2.0)]).attach(tiny):
            torch.testing.assert_close(tiny.denoise(x, sigma, cond), apart, atol=1e-5, rtol=1e-4)
        with one.scaled(0.5).attach(tiny):
            half = tiny.denoise(x, sigma, cond)
        with one.attach(tiny, 0.5):
            torch.testing.assert_close(tiny.denoise(x, sigma, cond), half, atol=1e-5, rtol=1e-4)


def test_a_delta_of_another_model_is_refused_and_leaves_no_hook(tiny):
    layers = select("cross-attn", tiny)
    good = zeros(layers)
    name = next(iter(layers))
    for bad, message in (
        (Delta({**good.layers, "lora_unet_elsewhere": good.layers[name]}), "lora_unet_elsewhere"),
        (Delta({**good.layers, name: LayerDelta(torch.zeros(3, 3))}), "shape"),
        (Delta({**good.layers, name: LayerDelta(good.layers[name].weight, torch.zeros(32))}), "None"),
    ):
        with pytest.raises(IncompatibleDelta, match=message):
            bad.attach(tiny)
    assert not any(module._forward_hooks for module in tiny.network.modules())


def test_norm_is_the_norm_of_all_changes_together():
    delta = Delta({"a": LayerDelta(torch.tensor([[3.0]])), "b": LayerDelta(None, torch.tensor([4.0]))})
    assert delta.norm().item() == pytest.approx(5.0)
    zero = Delta({"a": LayerDelta(torch.zeros(2, 2, requires_grad=True))})
    zero.norm().backward()
    assert torch.isfinite(zero.layers["a"].weight.grad).all()


def test_low_rank_approximation_is_the_best_and_says_what_it_keeps():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(8, 3))[0], torch.linalg.qr(torch.randn(6, 3))[0]
    weight = u @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ v.T
    lora, kept = to_lora(Delta({"a": LayerDelta(weight)}), 2)
    assert kept == pytest.approx((16 + 4) / 21, abs=1e-5)
    assert (lora.layers["a"].weight.dense() - weight).norm().item() == pytest.approx(1.0, abs=1e-4)
    exact, kept = to_lora(Delta({"a": LayerDelta(weight)}), 3)
    assert kept == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(exact.layers["a"].weight.dense(), weight, atol=1e-5, rtol=1e-4)
    # what has no rank, as a norm's weight, is kept whole
    _, kept = to_lora(Delta({"a": LayerDelta(weight), "n": LayerDelta(torch.ones(5))}), 1)
    assert kept == pytest.approx((16 + 5) / (21 + 5), abs=1e-5)


def test_low_rank_of_a_convolution_keeps_its_shape_and_biases_stay():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    lora, kept = to_lora(Delta({"a": LayerDelta(weight, bias), "n": LayerDelta(torch.ones(5), torch.ones(5))}), 6)
    assert kept == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(lora.layers["a"].weight.dense(), weight, atol=1e-4, rtol=1e-3)
    assert torch.equal(lora.layers["a"].bias, bias) and torch.equal(lora.layers["n"].weight, torch.ones(5))
    with pytest.raises(AblationError, match="at least 1"):
        to_lora(lora, 0)


def test_merging_low_rank_joins_factors_and_refuses_other_shapes():
    torch.manual_seed(0)
    a, b = (LowRank(torch.randn(5, 1), torch.randn(1, 4)) for _ in range(2))
    merged = merge([(Delta({"x": LayerDelta(a)}), 1.0), (Delta({"x": LayerDelta(b)}), 0.5)]).layers["x"].weight
    assert merged.up.shape == (5, 2)
    torch.testing.assert_close(merged.dense(), a.dense() + 0.5 * b.dense())
    mixed = merge([(Delta({"x": LayerDelta(a)}), 1.0), (Delta({"x": LayerDelta(torch.ones(5, 4))}), 2.0)])
    torch.testing.assert_close(mixed.layers["x"].weight, a.dense() + 2.0)
    with pytest.raises(AblationError, match="different models"):
        merge([(Delta({"x": LayerDelta(a)}), 1.0), (Delta({"x": LayerDelta(torch.ones(4, 4))}), 1.0)])
    with pytest.raises(AblationError, match="nothing to merge"):
        merge([])


def named(*layers: str, **header: str) -> Delta:
    metadata = {f"concept_ablation.{key}": value for key, value in header.items()}
    return Delta({name: LayerDelta(torch.ones(2, 2)) for name in layers}, metadata)


def test_a_merge_says_what_it_is_the_sum_of_and_keeps_what_all_say_of_the_model():
    cat = named("a", target="cat", architecture="sd1", base_model="one", base_model_sha256="1", steps="9")
    fish = named("a", target="fish", architecture="sd1", base_model="one", base_model_sha256="1")
    both = merge([(cat, 0.5), (fish, -1.0)])
    of_one = {
        "concept_ablation.architecture": "sd1",
        "concept_ablation.base_model": "one",
        "concept_ablation.base_model_sha256": "1",
    }
    assert both.metadata == {**of_one, "concept_ablation.merged": "cat x 0.5; fish x -1"}
    chained = merge([(both, 2.0), (fish, 1.0)])
    assert chained.metadata == {**of_one, "concept_ablation.merged": "(cat x 0.5; fish x -1) x 2; fish x 1"}
    other = named("a", target="dog", architecture="sd1", base_model="two", base_model_sha256="2")
    mixed = merge([(cat, 1.0), (other, 1.0)])
    assert mixed.metadata.keys() == {"concept_ablation.architecture", "concept_ablation.merged"}
    # what was made for two models is for neither, and a LoRA says nothing
    for part in (mixed, named("a")):
        assert "concept_ablation.base_model" not in merge([(cat, 1.0), (part, 1.0)]).metadata


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("lora_unet_mid_block_resnets_0_conv1", "diffusion_model.middle_block.0.in_layers.2"),
        ("lora_unet_output_blocks_0_1_proj_in", "diffusion_model.output_blocks.0.1.proj_in"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        ),
    ],
)
def test_two_names_for_one_layer_are_not_merged(ours, other):
    with pytest.raises(AblationError, match="name layers in two ways") as refused:
        merge([(named(ours), 1.0), (named(other), 1.0)])
    assert ours in str(refused.value) and other in str(refused.value) and "\n" not in str(refused.value)
    embedding = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"
    for name in (ours, other):
        assert merge([(named(name), 1.0), (named(embedding), 1.0)]).layers.keys() == {name, embedding}
