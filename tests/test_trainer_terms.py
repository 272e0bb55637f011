"""What each term of a training step is, against the same thing computed by hand; and that options do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from concept_ablation.core import dataset, trainer
from concept_ablation.core.harvest import HarvestSettings, harvest
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.subsets import empty_delta
from concept_ablation.core.trainer import OBJECTIVES, TARGET_IMAGES, TrainSettings
from concept_ablation.tests.test_trainer import CAT, IMAGES, TRAIN

CASES = [
    (objective, strength)
    for objective in OBJECTIVES
    # images of the target regularize nothing
    for strength in ((0.0,) if objective in TARGET_IMAGES else (0.0, 0.5))
]


def mean_square(first: Tensor, second: Tensor) -> float:
    return (first - second).square().mean().item()


@pytest.mark.parametrize(("objective", "regularization"), CASES)
def test_a_step_has_the_terms_of_its_objective(tiny, objective, regularization):
    """At an edit that is not nothing, where student, frozen teacher and self teacher all differ."""
    source = "target" if objective in TARGET_IMAGES else "anchor"
    data = dataset.build(tiny, [CAT], replace(IMAGES, source=source))
    settings = replace(TRAIN, objective=objective, regularization=regularization, preserve_weight=3.0)
    torch.manual_seed(0)
    delta = empty_delta("cross-attn", tiny, [CAT]).map(torch.randn_like)
    batch = next(trainer._batches(tiny, data, settings))
    count = batch.ablating

    def predicted(rows: Tensor) -> Tensor:
        return tiny.direction(batch.x, batch.sigma, tiny.encode([data.plan.prompts[row] for row in rows.tolist()]))

    with torch.no_grad():
        frozen = predicted(batch.anchor)
        with delta.attach(tiny) as attachment:
            prompts = trainer.Prompts(tiny, data.plan.prompts, attachment, "cross-attn")
            objective_part, rest = trainer._step_loss(tiny, batch, delta, attachment, prompts, settings)
            student, anchor = predicted(batch.target), predicted(batch.anchor)
    truth = (batch.x - batch.x0) / batch.sigma.view(-1, 1, 1, 1)
    teachers = {"model": frozen, "reverse-kl": frozen, "model-self": anchor, "noise": truth, "loss-max": truth}
    loss = mean_square(student[:count], teachers[objective][:count])
    preserved = mean_square(student[count:], frozen[count:])
    assert preserved > 1e-4
    assert objective_part.item() == pytest.approx(max(1 - loss, 0) if objective == "loss-max" else loss, rel=1e-4)
    regularized = mean_square(anchor[:count], truth[:count])
    assert rest.item() == pytest.approx(3 * preserved + regularization * regularized, rel=1e-4)


def test_latents_are_flipped_at_random(tiny):
    data = dataset.build(tiny, [CAT], IMAGES)
    mirrored = []
    for batch in trainer._batches(tiny, data, replace(TRAIN, flip=True, steps=10)):
        for row in batch.x0:
            plain = any(torch.equal(row, latent) for latent in data.latents)
            mirrored.append(any(torch.equal(row, latent.flip(-1)) for latent in data.latents))
            assert plain != mirrored[-1]
    assert 0 < sum(mirrored) < len(mirrored)


def test_gradients_are_computed_at_the_scale(tiny, monkeypatch):
    data = dataset.build(tiny, [CAT], IMAGES)
    tiny.gradient_scale = 1024.0
    scaled, backward = [], Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda self: scaled.append(self.item()) or backward(self))
    result = trainer.train(tiny, data, replace(TRAIN, steps=1, preserve_batch=0))
    assert scaled == [pytest.approx(1024 * result.losses[0], rel=1e-5)]


def test_checkpointing_computes_blocks_again(tiny):
    data = dataset.build(tiny, [CAT], IMAGES)
    calls = []
    tiny.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def count(checkpointing: bool) -> int:
        calls.clear()
        trainer.train(tiny, data, replace(TRAIN, subset="full", learning_rate=1e-6, checkpointing=checkpointing))
        return len(calls)

    assert count(True) == count(False) + TRAIN.steps


def test_harvested_rows_that_preserve_weigh_as_much_as_they_should(tiny):
    """From nothing their loss is 0, so the first step has the objective alone, and later ones do not."""
    rows = harvest(tiny, [CAT], HarvestSettings(trajectories=3, preserve=3, prompts=3), surrounding=[["dog"]])
    settings = TrainSettings(steps=3, batch=4, preserve_batch=4, learning_rate=1e-2, cosine=False)
    deltas = [
        train_harvested(tiny, rows, replace(settings, preserve_weight=weight)).delta for weight in (1.0, 1.0, 30.0)
    ]
    first, same, heavier = (
        torch.cat([tensor.flatten() for layer in delta.layers.values() for tensor in layer.tensors()])
        for delta in deltas
    )
    assert torch.equal(first, same) and (first - heavier).norm() > 0.01 * first.norm()
