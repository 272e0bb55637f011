"""Each objective against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from concept_ablation.core.denoiser import true_direction
from concept_ablation.core.losses import loss_maximization, model_based, noise_based

STUDENT = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
OTHER = torch.tensor([[[[0.0, 4.0]]]], requires_grad=True)


def test_model_based_is_the_mean_square_and_stops_the_teachers_gradient():
    loss = model_based(STUDENT, OTHER)
    assert loss.item() == pytest.approx((1 + 4) / 2)
    student, teacher = torch.autograd.grad(loss, (STUDENT, OTHER), allow_unused=True)
    assert student.flatten().tolist() == [1.0, -2.0]
    assert teacher is None


def test_noise_based_is_the_mean_square():
    loss = noise_based(STUDENT, OTHER.detach())
    assert loss.item() == pytest.approx(2.5)
    assert torch.autograd.grad(loss, STUDENT)[0].flatten().tolist() == [1.0, -2.0]


def test_loss_maximization_pushes_away_until_the_loss_is_one():
    near = torch.tensor([[[[0.5, 4.0]]]], requires_grad=True)
    distance = torch.tensor(0.3)
    loss = loss_maximization(noise_based(near, OTHER.detach()), distance, 10.0)
    assert loss.item() == pytest.approx(1 - 0.125 + 3.0)
    assert torch.autograd.grad(loss, near)[0].flatten().tolist() == [-0.5, 0.0]
    # a loss of 2.5 is past the clamp: only the distance is left
    assert loss_maximization(noise_based(STUDENT, OTHER.detach()), distance, 10.0).item() == pytest.approx(3.0)


def test_true_direction_is_the_noise_for_diffusion_and_the_velocity_for_flows():
    x0, noise, sigma = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0.3, 0.8])
    level = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(true_direction(x0 + level * noise, sigma, x0), noise, atol=1e-5, rtol=1e-4)
    flow = (1 - level) * x0 + level * noise
    torch.testing.assert_close(true_direction(flow, sigma, x0), noise - x0, atol=1e-5, rtol=1e-4)
