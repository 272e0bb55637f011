"""The compiled network: the same predictions, of whatever parameters are in its layers, and nothing left of it."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core import compiling
from concept_ablation.core.compiling import WORTH, compiled
from concept_ablation.core.delta import zeros
from concept_ablation.core.merged import merged
from concept_ablation.core.subsets import select


def prediction(model) -> torch.Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.denoise(x, torch.tensor([0.7, 5.0]), model.encode(["a tropical fish", "a cat"]))


def test_a_compiled_network_predicts_with_the_parameters_that_are_merged(tiny):
    if not compiling._works():
        pytest.skip("PyTorch finds no C++ compiler")
    torch.manual_seed(0)
    network, before = tiny.network, prediction(tiny)
    delta = zeros(select("cross-attn", tiny)).map(lambda tensor: tensor + 0.05 * torch.randn_like(tensor))
    with merged(delta, tiny):
        expected = prediction(tiny)
    assert (expected - before).abs().max() > 1e-3
    for _ in range(2):
        with compiled(tiny, WORTH):
            assert tiny.network is not network
            torch.testing.assert_close(prediction(tiny), before, atol=1e-4, rtol=1e-4)
            with merged(delta, tiny):
                torch.testing.assert_close(prediction(tiny), expected, atol=1e-4, rtol=1e-4)
    assert tiny.network is network and torch.equal(prediction(tiny), before)


def test_the_network_comes_back_after_an_error(tiny, monkeypatch):
    monkeypatch.setattr(compiling, "_works", lambda: True)
    network, names = tiny.network, list(tiny.network.state_dict())

    def interrupted() -> None:
        with compiled(tiny, WORTH):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tiny.network is network and list(network.state_dict()) == names


@pytest.mark.parametrize(("rows", "works"), [(WORTH - 1, True), (WORTH, False)])
def test_it_stays_as_it_is_where_compiling_does_not_pay_or_work(tiny, monkeypatch, rows, works):
    monkeypatch.setattr(compiling, "_works", lambda: works)
    network = tiny.network
    with compiled(tiny, rows):
        assert tiny.network is network


def test_no_compiler_is_no_error(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler")

    compiling._works.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    try:
        assert not compiling._works()
    finally:
        compiling._works.cache_clear()
