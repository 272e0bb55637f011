"""Deltas merged for drawing: the same model as with hooks, and nothing left of it afterwards."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.delta import Delta, LayerDelta, zeros, zeros_in_rows
from concept_ablation.core.errors import IncompatibleDelta
from concept_ablation.core.merged import merged
from concept_ablation.core.subsets import select


def noisy(delta: Delta, scale: float = 0.05) -> Delta:
    torch.manual_seed(0)
    return delta.map(lambda tensor: tensor + scale * torch.randn_like(tensor))


def prediction(model, prompt: str = "a tropical fish") -> torch.Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.denoise(x, torch.tensor([0.7, 5.0]), model.encode([prompt, "a cat"]))


def of_rows(model) -> Delta:
    """A change of the token embeddings, as the subset embedding makes it."""
    name, embedding = next((n, m) for n, m in model.layers.items() if isinstance(m, torch.nn.Embedding))
    rows = zeros_in_rows(name, embedding, model.tokenize("tropical fish"))
    change = rows.layers[name].weight
    return Delta({name: LayerDelta(type(change)(change.up, torch.randn_like(change.down)))})


@pytest.mark.parametrize("subset", ["full", "cross-attn", "embedding"])
def test_a_merged_delta_predicts_what_an_attached_one_does(tiny, subset):
    delta = of_rows(tiny) if subset == "embedding" else noisy(zeros(select(subset, tiny)))
    before, fingerprint = prediction(tiny), tiny.fingerprint()
    with delta.attach(tiny):
        expected = prediction(tiny)
    with merged(delta, tiny):
        found = prediction(tiny)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(prediction(tiny), before) and tiny.fingerprint() == fingerprint


def test_the_parameters_themselves_come_back_after_an_error(tiny):
    parameters = dict(tiny.network.named_parameters())
    layouts = {name: parameter.stride() for name, parameter in parameters.items()}
    delta = noisy(zeros(select("full", tiny)))

    def interrupted() -> None:
        with merged(delta, tiny):
            edited = dict(tiny.network.named_parameters())
            assert {name: parameter.stride() for name, parameter in edited.items()} == layouts
            assert not any(parameter.requires_grad for parameter in edited.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = dict(tiny.network.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)


def test_half_precision_weights_are_edited_by_hooks(tiny):
    tiny.network.to(torch.bfloat16)
    delta = noisy(zeros(select("cross-attn", tiny)), 1e-5)
    before = {name: tiny.layers[name].weight for name in delta.layers}
    with merged(delta, tiny):
        assert all(tiny.layers[name].weight is before[name] for name in before)
        assert all(tiny.layers[name]._forward_hooks for name in before)
    assert not any(tiny.layers[name]._forward_hooks for name in before)


def test_a_delta_of_another_model_is_refused_and_changes_nothing(tiny):
    fingerprint = tiny.fingerprint()
    with pytest.raises(IncompatibleDelta), merged(Delta({"lora_unet_x": LayerDelta(torch.zeros(2, 2))}), tiny):
        pass
    assert tiny.fingerprint() == fingerprint
