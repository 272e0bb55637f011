"""Training on harvested rows: where it leads, one pass a step, warm starts, what a failure leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from concept_ablation.core import harvest, trainer
from concept_ablation.core.closed_form import ClosedFormSettings, solution
from concept_ablation.core.concept import Concept
from concept_ablation.core.delta import Delta, LayerDelta
from concept_ablation.core.errors import AblationError, Diverged, IncompatibleDelta, Interrupted
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.trainer import TrainSettings

CAT = Concept("grumpy cat", "cat")
SETTINGS = HarvestSettings(
    trajectories=6, preserve=4, prompts=4, sample=SampleSettings(steps=4, guidance=3.0), batch=3, seed=7
)
TRAIN = TrainSettings(steps=4, batch=4, preserve_batch=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def rows(make_model):
    """24 rows that ablate and 16 that preserve."""
    return harvest.harvest(make_model(), [CAT], SETTINGS, surrounding=[["dog"]])


@pytest.fixture(scope="module")
def held_out(make_model):
    """The same prompts with other seeds."""
    return harvest.harvest(make_model(), [CAT], replace(SETTINGS, seed=99), surrounding=[["dog"]])


def prompts_of(rows, column):
    return [rows.plan.prompts[pair[column]] for pair in rows.pairs.tolist()]


def state(denoiser):
    """All that training must leave as it was."""
    modules = [*denoiser.network.modules(), *denoiser.text_network.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in parameters]
    hooks = sum(len(module._forward_hooks) for module in modules)
    return denoiser.fingerprint(), flags, hooks, denoiser.text_edits, denoiser.network.training


def tensors(delta):
    return [tensor for layer in delta.layers.values() for tensor in layer.tensors()]


@torch.no_grad()
def gaps(model, rows, delta=None):
    """(mean squared distance of the prediction for the target prompt from the anchor's, ablating; preserving)."""
    with (delta or Delta({})).attach(model):
        found = model.direction(rows.x, rows.sigma, model.encode(prompts_of(rows, 1)))
    distance = (found - rows.prediction.float()).square().mean((1, 2, 3))
    return distance[~rows.preserving].mean().item(), distance[rows.preserving].mean().item()


def test_training_moves_the_target_to_the_anchor_on_unseen_rows_and_preserved_prompts_less(tiny, rows, held_out):
    settings = TrainSettings(steps=120, batch=8, preserve_batch=8, preserve_weight=4.0, learning_rate=1e-2)
    before = state(tiny)
    apart, _ = gaps(tiny, held_out)
    result = train_harvested(tiny, rows, settings)
    left, drift = gaps(tiny, held_out, result.delta)
    assert len(result.losses) == 120 and sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])
    assert left < 0.6 * apart
    assert drift < 0.25 * (apart - left)
    _, careless = gaps(tiny, held_out, train_harvested(tiny, rows, replace(settings, preserve_batch=0)).delta)
    assert drift < 0.7 * careless
    assert state(tiny) == before
    assert not any(tensor.requires_grad for tensor in tensors(result.delta))


def test_the_first_loss_is_the_mean_squared_distance_of_the_first_rows(tiny, rows):
    batch = replace(TRAIN, steps=1, batch=24, preserve_batch=0)
    assert train_harvested(tiny, rows, batch).losses[0] == pytest.approx(gaps(tiny, rows)[0], rel=1e-3)


def test_a_step_is_one_forward_and_one_backward_pass(tiny, rows, monkeypatch):
    calls, backwards, encoded = [], [], []
    denoise, encode, backward = type(tiny).denoise, type(tiny)._encode, torch.Tensor.backward

    def counted(self, x, sigma, cond):
        calls.append((len(x), torch.is_grad_enabled()))
        return denoise(self, x, sigma, cond)

    monkeypatch.setattr(type(tiny), "denoise", counted)
    monkeypatch.setattr(type(tiny), "_encode", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: backwards.append(1) or backward(self))
    monkeypatch.setattr(type(tiny.vae), "encode", lambda *_: pytest.fail("no autoencoder"))
    monkeypatch.setattr(type(tiny.vae), "decode", lambda *_: pytest.fail("no autoencoder"))
    train_harvested(tiny, rows, TRAIN)
    assert calls == [(6, True)] * 4 and len(backwards) == 4
    assert sum(encoded) == len(rows.plan.prompts), "each distinct prompt is encoded once"


class ReadsByHost(TorchDispatchMode):
    """Counts the operations that bring a number from the device to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_in_every_step_where_that_costs_time(tiny, rows, monkeypatch):
    every_step = train_harvested(tiny, rows, replace(TRAIN, steps=23))

    def count(steps):
        with ReadsByHost() as reads:
            train_harvested(tiny, rows, replace(TRAIN, steps=steps))
        return reads.count

    monkeypatch.setattr(trainer, "_read_every", lambda device: 10)
    # a step of AdamW on a CPU reads its own counters there
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert count(23) == count(3)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "_read_every", lambda device: 10)
    seen = []
    seldom = train_harvested(tiny, rows, replace(TRAIN, steps=23), on_progress=lambda progress: seen.append(progress))
    assert seldom.losses == every_step.losses
    assert [progress.step for progress in seen] == list(range(1, 24))
    read_at = [0] * 10 + [10] * 10 + [20] * 2 + [22]
    assert [progress.loss for progress in seen] == [every_step.losses[step] for step in read_at]


def test_the_same_seed_gives_the_same_delta(make_model, rows):
    same, again, other = (
        train_harvested(make_model(), rows, settings).delta for settings in (TRAIN, TRAIN, replace(TRAIN, seed=1))
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(other), strict=True))


@pytest.mark.parametrize("subset", ["attn", "full", "embedding"])
def test_every_subset_can_be_trained(tiny, rows, subset):
    before = state(tiny)
    result = train_harvested(tiny, rows, replace(TRAIN, subset=subset, learning_rate=1e-3))
    assert result.delta.norm() > 1e-3 and state(tiny) == before


def test_a_gradient_scale_and_checkpointing_change_the_arithmetic_not_the_delta(make_model, rows):
    plain = train_harvested(make_model(), rows, TRAIN)
    scaled = make_model()
    scaled.gradient_scale = 1024.0
    saved = train_harvested(scaled, rows, replace(TRAIN, checkpointing=True))
    for name, layer in plain.delta.layers.items():
        torch.testing.assert_close(saved.delta.layers[name].weight, layer.weight, rtol=1e-4, atol=1e-6)


def test_training_begins_where_the_closed_form_ends(tiny, rows):
    start = solution(tiny, [CAT], ClosedFormSettings(prompts=4, preserve_prompts=4), surrounding=[["dog"]])
    kept = [tensor.clone() for tensor in tensors(start)]
    batch = replace(TRAIN, batch=24, preserve_batch=16)
    result = train_harvested(tiny, rows, batch, start=start)
    assert result.losses[0] == pytest.approx(gaps(tiny, rows, start)[0], rel=1e-3)
    assert result.losses[0] != pytest.approx(gaps(tiny, rows)[0], rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(tensors(start), kept, strict=True))
    assert not any(tensor.requires_grad for tensor in tensors(start))
    # any smaller change moves less than the start did
    still = train_harvested(tiny, rows, replace(batch, learning_rate=1e-9), start=start).delta
    for name, layer in start.layers.items():
        torch.testing.assert_close(still.layers[name].weight, layer.weight, rtol=0, atol=1e-7)
    wider = train_harvested(tiny, rows, replace(TRAIN, subset="attn", learning_rate=1e-9), start=start).delta
    assert set(wider.layers) > set(start.layers)
    torch.testing.assert_close(wider.norm(), start.norm(), rtol=1e-4, atol=0)


def test_a_start_that_does_not_fit_is_refused(tiny, rows):
    start = train_harvested(tiny, rows, replace(TRAIN, steps=1, subset="attn")).delta
    for subset in ("cross-attn", "embedding"):
        with pytest.raises(AblationError, match=f"'{subset}'"):
            train_harvested(tiny, rows, replace(TRAIN, subset=subset), start=start)
    name = next(iter(start.layers))
    with pytest.raises(IncompatibleDelta):
        train_harvested(tiny, rows, TRAIN, start=Delta({name: LayerDelta(torch.zeros(2, 2))}))


@pytest.mark.parametrize("change", [{"objective": "noise"}, {"flip": True}, {"regularization": 1.0}])
def test_what_rows_cannot_give_is_refused(tiny, rows, change):
    with pytest.raises(AblationError, match="Harvested rows"):
        train_harvested(tiny, rows, replace(TRAIN, **change))


def test_nan_divergence_cancel_and_exceptions_leave_the_model_as_it_was(tiny, rows, monkeypatch):
    before = state(tiny)
    poisoned = replace(rows, prediction=torch.full_like(rows.prediction, float("nan")))
    with pytest.raises(Diverged, match="learning rate"):
        train_harvested(tiny, poisoned, TRAIN)
    with pytest.raises(Diverged, match="learning rate"):
        train_harvested(tiny, rows, replace(TRAIN, learning_rate=1e6, cosine=False, steps=20))

    def cancel(progress):
        if progress.step == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        train_harvested(tiny, rows, TRAIN, on_progress=cancel)
    calls = []
    denoise = type(tiny).denoise

    def broken(self, x, sigma, cond):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return denoise(self, x, sigma, cond)

    monkeypatch.setattr(type(tiny), "denoise", broken)
    with pytest.raises(torch.OutOfMemoryError):
        train_harvested(tiny, rows, TRAIN)
    assert state(tiny) == before


def test_nan_between_two_readings_is_found(tiny, rows, monkeypatch):
    monkeypatch.setattr(trainer, "_read_every", lambda device: 10)
    before = state(tiny)
    with pytest.raises(Diverged, match=r"at step [2-9] "):
        train_harvested(tiny, rows, replace(TRAIN, learning_rate=1e6, cosine=False, steps=15))
    assert state(tiny) == before
