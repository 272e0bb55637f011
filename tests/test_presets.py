"""The presets' numbers: the published ones as published, and what follows from kind, subset and model."""

from __future__ import annotations

import pytest

from concept_ablation.core.errors import AblationError
from concept_ablation.core.presets import recipe


def test_paper_preset_has_the_published_settings(tiny):
    made = recipe("paper", tiny)
    assert (made.dataset.images, made.dataset.prompts, made.dataset.preserve) == (1000, 200, 0)
    assert (made.dataset.sample.guidance, made.dataset.sample.eta) == (6.0, 1.0)
    training = made.training
    assert (training.objective, training.subset, training.steps, training.batch) == ("model-self", "cross-attn", 100, 8)
    assert training.learning_rate == pytest.approx(1.6e-5)
    assert training.flip and not training.cosine
    assert recipe("paper", tiny, subset="embedding").training.learning_rate == pytest.approx(8e-5)
    memorized = recipe("paper", tiny, "memorized").training
    assert (memorized.subset, memorized.steps, memorized.batch, memorized.regularization) == ("full", 800, 4, 1.0)
    assert memorized.learning_rate == pytest.approx(2e-6)


def test_a_smaller_batch_also_means_fewer_rows_that_preserve(tiny):
    def batches(**training):
        made = recipe("balanced", tiny, training=training).training
        return made.batch, made.preserve_batch

    assert batches() == (16, 16)
    assert batches(batch=4) == (4, 4)
    assert batches(batch=64) == (64, 16)
    assert batches(batch=4, preserve_batch=9) == (4, 9)


def test_learning_rates_follow_the_model(tiny):
    plain = recipe("balanced", tiny).training.learning_rate
    tiny.learning_rate_scale = 100.0
    assert recipe("balanced", tiny).training.learning_rate == pytest.approx(100 * plain)
    assert recipe("balanced", tiny, training={"learning_rate": 0.5}).training.learning_rate == 0.5


def test_the_images_follow_the_objective(tiny):
    assert recipe("balanced", tiny, objective="noise").dataset.source == "anchor"
    assert recipe("balanced", tiny, objective="reverse-kl").dataset.source == "target"


def test_seed_and_changes_reach_both_parts(tiny):
    made = recipe("balanced", tiny, seed=5, training={"steps": 3}, dataset={"images": 2})
    assert (made.dataset.seed, made.training.seed, made.training.steps, made.dataset.images) == (5, 5, 3, 2)


def test_unknown_names_are_refused(tiny):
    with pytest.raises(AblationError, match="balanced, paper"):
        recipe("fastest", tiny)
    with pytest.raises(AblationError, match="objective"):
        recipe("balanced", tiny, objective="magic")
