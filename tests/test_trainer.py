"""The training loop: objectives, determinism, what is left behind when something goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_ablation.core import dataset, trainer
from concept_ablation.core.batches import shuffled
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError, Diverged, Interrupted
from concept_ablation.core.presets import recipe
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.subsets import SUBSETS
from concept_ablation.core.trainer import OBJECTIVES, TARGET_IMAGES, TrainSettings, train

CAT = Concept("grumpy cat", "cat")
IMAGES = DatasetSettings(images=8, preserve=4, prompts=8, sample=SampleSettings(steps=2, guidance=2.0), batch=12)
TRAIN = TrainSettings(steps=4, batch=4, preserve_batch=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(make_model):
    return dataset.build(make_model(), [CAT], IMAGES)


@pytest.fixture(scope="module")
def target_data(make_model):
    return dataset.build(make_model(), [CAT], replace(IMAGES, source="target"))


def state(denoiser):
    """All that training must leave as it was."""
    modules = [*denoiser.network.modules(), *denoiser.text_network.modules()]
    flags = [parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False)]
    grads = [parameter.grad is None for module in modules for parameter in module.parameters(recurse=False)]
    hooks = sum(len(module._forward_hooks) for module in modules)
    return denoiser.fingerprint(), flags, grads, hooks, denoiser.text_edits, denoiser.network.training


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("objective", [objective for objective in OBJECTIVES if objective != "loss-max"])
def test_every_objective_moves_every_subset(tiny, data, target_data, objective, subset):
    before = state(tiny)
    chosen = target_data if objective in TARGET_IMAGES else data
    strength = 0.0 if objective in TARGET_IMAGES else 0.5
    training = {"objective": objective, "subset": subset, "regularization": strength, "flip": True}
    result = train(tiny, chosen, replace(TRAIN, learning_rate=1e-3, **training))
    assert len(result.losses) == 4 and result.delta.norm() > 1e-3
    assert state(tiny) == before
    assert not any(tensor.requires_grad for layer in result.delta.layers.values() for tensor in layer.tensors())


@pytest.mark.parametrize("objective", TARGET_IMAGES)
def test_images_of_the_target_regularize_nothing(tiny, target_data, objective):
    with pytest.raises(AblationError, match="set regularization to 0"):
        train(tiny, target_data, replace(TRAIN, objective=objective, regularization=1.0))


def test_the_baseline_raises_the_loss_of_the_target(emoji):
    """On a trained model, because a random one's loss is past the clamp of Eq. 7 from the start."""
    images = replace(IMAGES, images=4, preserve=0, source="target")
    data = dataset.build(emoji, [Concept("rooster", "bird")], images)
    weight = recipe("balanced", emoji, objective="loss-max").training.distance_weight
    settings = TrainSettings(
        objective="loss-max", steps=30, batch=4, learning_rate=2e-3, cosine=False, distance_weight=weight
    )
    found = train(emoji, data, settings)
    assert 0.5 < found.losses[0] < 1
    assert sum(found.losses[-5:]) < 0.9 * sum(found.losses[:5]), "L rose by more than the edit's norm costs"
    # a weight above the gradient of L draws every step back
    heavy = train(emoji, data, replace(settings, distance_weight=10.0))
    assert heavy.delta.norm() < 0.1 * found.delta.norm()


@pytest.mark.parametrize("change", [{"distance_weight": -1.0}, {"distance_weight": 1.0, "objective": "noise"}])
def test_a_distance_that_cannot_be_weighed_is_refused(change):
    with pytest.raises(AblationError, match="weight of the distance"):
        TrainSettings(**change)


def test_training_lowers_the_objective(tiny, data):
    """A random network's predictions for two prompts are brought together."""
    result = train(tiny, data, TrainSettings(steps=150, batch=8, learning_rate=1e-2, subset="attn"))
    assert sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])


def test_preservation_holds_the_preserved_prompts(emoji):
    """Trained with preservation, the edit changes the predictions for the preserved prompts less."""
    images = replace(IMAGES, images=8, preserve=16, batch=24)
    data = dataset.build(emoji, [Concept("rooster", "bird")], images, surrounding=[["owl", "duck"]])
    rows = data.preserving.nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    sigma = emoji.sigmas[torch.linspace(100, 900, len(rows)).long()]
    x = emoji.add_noise(data.latents[rows], torch.randn(data.latents[rows].shape, generator=generator), sigma)

    def drift(preserve_batch):
        settings = TrainSettings(steps=25, batch=8, preserve_batch=preserve_batch, preserve_weight=4.0)
        result = train(emoji, data, settings)
        with torch.no_grad():
            cond = emoji.encode([data.plan.prompts[data.plan.rows[row][0]] for row in rows.tolist()])
            original = emoji.direction(x, sigma, cond)
            with result.delta.attach(emoji):
                return (emoji.direction(x, sigma, cond) - original).square().mean().item()

    assert drift(8) < 0.7 * drift(0)


def test_the_same_seed_gives_the_same_delta(make_model, data):
    runs = [train(make_model(), data, TRAIN) for _ in range(2)] + [train(make_model(), data, replace(TRAIN, seed=1))]
    same, again, other = ([t for layer in run.delta.layers.values() for t in layer.tensors()] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same, other, strict=True))
    assert runs[0].losses == runs[1].losses


@pytest.mark.parametrize("subset", ["full", "embedding"])
def test_the_fused_optimizer_finds_gradients_where_it_expects_them(make_model, data, subset, monkeypatch):
    """With a gradient that lies in memory in another order than its parameter it goes wrong without a word."""
    settings = replace(TRAIN, subset=subset, learning_rate=1e-3)
    fused = train(make_model(), data, settings).delta
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **how: adamw(*given, **{**how, "fused": None}))
    plain = train(make_model(), data, settings).delta
    for name, layer in plain.layers.items():
        for found, expected in zip(fused.layers[name].tensors(), layer.tensors(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_parameters_in_another_order_are_left_to_the_plain_optimizer():
    rows, columns = torch.zeros(3, 4, requires_grad=True), torch.zeros(4, 3).T.requires_grad_(True)
    cpu = torch.device("cpu")
    assert trainer._adamw([rows], 0.1, cpu).defaults["fused"] is True
    assert trainer._adamw([rows, columns], 0.1, cpu).defaults["fused"] is None


def test_an_older_pytorch_without_a_fused_optimizer_takes_the_plain_one(monkeypatch):
    adamw = torch.optim.AdamW

    def older(*given, fused=None, **how):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return adamw(*given, **how)

    monkeypatch.setattr(torch.optim, "AdamW", older)
    assert trainer._adamw([torch.zeros(3, requires_grad=True)], 0.1, torch.device("cpu")).defaults["fused"] is None


def test_gradient_checkpointing_changes_memory_not_the_delta(make_model, data):
    plain, saved = (train(make_model(), data, replace(TRAIN, checkpointing=flag)) for flag in (False, True))
    for name, layer in plain.delta.layers.items():
        torch.testing.assert_close(saved.delta.layers[name].weight, layer.weight, rtol=1e-4, atol=1e-6)


def test_a_gradient_scale_changes_the_arithmetic_not_the_delta(make_model, data):
    plain, scaled = make_model(), make_model()
    scaled.gradient_scale = 1024.0
    plain, scaled = train(plain, data, TRAIN), train(scaled, data, TRAIN)
    assert scaled.losses[0] == plain.losses[0]
    for name, layer in plain.delta.layers.items():
        torch.testing.assert_close(scaled.delta.layers[name].weight, layer.weight, rtol=1e-4, atol=1e-6)


def test_self_teacher_begins_as_the_frozen_one_and_then_differs(tiny, data):
    frozen = train(tiny, data, replace(TRAIN, objective="model", preserve_batch=0))
    own = train(tiny, data, replace(TRAIN, objective="model-self", preserve_batch=0))
    assert own.losses[0] == pytest.approx(frozen.losses[0], rel=1e-5)
    assert own.losses[-1] != pytest.approx(frozen.losses[-1], rel=1e-5)


def test_cancel_leaves_the_model_as_it_was(tiny, data):
    before = state(tiny)

    def cancel(progress):
        if progress.step == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        train(tiny, data, TRAIN, cancel)
    assert state(tiny) == before


def test_an_exception_in_the_network_leaves_the_model_as_it_was(tiny, data, monkeypatch):
    before = state(tiny)
    calls = []
    denoise = type(tiny).denoise

    def broken(self, x, sigma, cond):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory")
        return denoise(self, x, sigma, cond)

    monkeypatch.setattr(type(tiny), "denoise", broken)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny, data, TRAIN)
    assert state(tiny) == before


def test_nan_and_divergence_stop_with_one_sentence(tiny, data):
    before = state(tiny)
    poisoned = replace(data, latents=torch.full_like(data.latents, float("nan")))
    with pytest.raises(Diverged, match="learning rate"):
        train(tiny, poisoned, TRAIN)
    with pytest.raises(Diverged, match="learning rate") as error:
        train(tiny, data, replace(TRAIN, learning_rate=1e6, cosine=False, steps=20))
    assert "\n" not in str(error.value)
    assert state(tiny) == before


def test_a_dataset_for_another_objective_is_refused(tiny, data, target_data):
    with pytest.raises(AblationError, match="images of the target"):
        train(tiny, data, replace(TRAIN, objective="reverse-kl"))
    with pytest.raises(AblationError, match="images of the anchor"):
        train(tiny, target_data, TRAIN)


@pytest.mark.parametrize(
    "change",
    [{"objective": "magic"}, {"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(AblationError):
        TrainSettings(**change)


def test_rows_pass_through_the_dataset_before_any_comes_again():
    rows = torch.arange(5)
    batches = shuffled(rows, 2, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:5].tolist()) == sorted(drawn[5:].tolist()) == rows.tolist()
    assert len(next(shuffled(rows[:0], 3, torch.Generator()))) == 0
