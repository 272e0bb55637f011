"""Frozen layers: the same results and gradients, with less kept for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from concept_ablation.core.hosts.frozen import keep_little, speed_up_norms


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "convolution": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
        "pointwise": lambda: nn.Conv2d(8, 8, 1, bias=False),
        "linear": lambda: nn.Linear(8, 5),
        "gated": lambda: GEGLU(8, 6),
        "norm": lambda: nn.GroupNorm(4, 8),
        "activated": lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()),
    }
    return layers[name]().requires_grad_(False)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name in ("linear", "gated"):
        return torch.randn(3, 7, 8, generator=generator, dtype=dtype)
    x = torch.randn(3, 8, 10, 10, generator=generator, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def passed(layer: nn.Module, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor, int]:
    """(output, gradient of the input, bytes that were kept and are no weights)."""
    x = x.clone().requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = layer(x)
    generator = torch.Generator().manual_seed(2)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return output.detach(), x.grad, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["convolution", "pointwise", "linear", "gated", "norm", "activated"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_frozen_layer_gives_the_same_and_keeps_less(name, autocast):
    plain, little = make(name), make(name)
    keep_little(little, torch.bfloat16 if autocast else torch.float32)
    speed_up_norms(little)
    # as in the network, what reaches a normalization under autocast is in bf16
    x = inputs(name, torch.bfloat16 if autocast and name in ("norm", "activated") else torch.float32)
    output, gradient, before = passed(plain, x, autocast)
    found, back, after = passed(little, x, autocast)
    assert found.dtype == output.dtype and back.dtype == gradient.dtype
    # normalizing in fp32 is the more exact of the two
    tolerance = 1e-2 if autocast else 1e-6
    torch.testing.assert_close(found, output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(back, gradient, rtol=tolerance, atol=2 * tolerance)
    assert after <= before and (after < before or name in ("norm", "linear"))


@pytest.mark.parametrize("name", ["convolution", "pointwise", "linear", "gated", "activated"])
def test_without_gradients_a_layer_is_the_one_that_it_was(name):
    plain, little = make(name), keep_little(make(name), torch.float32)
    with torch.no_grad():
        assert torch.equal(little(inputs(name)), plain(inputs(name)))


def test_what_is_cheap_to_compute_again_is_not_kept():
    unit = keep_little(GEGLU(8, 32).requires_grad_(False), torch.float32)
    x = inputs("gated")
    assert passed(unit, x, autocast=False)[2] == x.untyped_storage().nbytes()
    norm, both = (speed_up_norms(keep_little(make(name), torch.float32)) for name in ("norm", "activated"))
    x = inputs("norm")
    assert passed(both, x, autocast=False)[2] == passed(norm, x, autocast=False)[2]


def test_a_delta_on_the_projection_of_a_gated_unit_takes_part():
    unit = keep_little(make("gated"), torch.float32)
    added = torch.full((12, 8), 0.1, requires_grad=True)
    handle = unit.proj.register_forward_hook(lambda module, given, output: output + given[0] @ added.t())
    plain = make("gated")
    with torch.no_grad():
        plain.proj.weight += 0.1
    output, gradient, _ = passed(unit, inputs("gated"), autocast=False)
    expected, back, _ = passed(plain, inputs("gated"), autocast=False)
    handle.remove()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, back)
    assert added.grad.abs().sum() > 0


def test_under_autocast_no_copy_of_a_frozen_weight_is_kept():
    wide = nn.Linear(8, 4096).requires_grad_(False)
    little = keep_little(copy.deepcopy(wide), torch.bfloat16)
    kept = [passed(layer, inputs("linear"), autocast=True)[2] for layer in (wide, little)]
    assert kept[0] >= 8 * 4096 * 2 and kept[1] < 1000


@pytest.mark.parametrize("name", ["convolution", "linear", "norm"])
def test_a_weight_that_is_trained_gets_its_gradient(name):
    plain, little = make(name).requires_grad_(True), make(name).requires_grad_(True)
    keep_little(little, torch.float32)
    speed_up_norms(little)
    for layer in (plain, little):
        passed(layer, inputs(name), autocast=False)
    for first, second in zip(plain.parameters(), little.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad)


def test_gradients_are_those_of_finite_differences():
    for name in ("convolution", "gated"):  # normalization computes in fp32, which finite differences do not bear
        layer = keep_little(make(name).double(), torch.float64)
        x = inputs(name, torch.float64)[:1].requires_grad_(True)
        assert torch.autograd.gradcheck(layer, (x,))


def test_derived_layers_and_circular_padding_are_left_alone():
    class Derived(nn.Linear):
        pass

    network = nn.Sequential(Derived(2, 2), nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    keep_little(network, torch.float32)
    assert type(network[0]) is Derived and type(network[1]) is nn.Conv2d
