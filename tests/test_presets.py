"""The presets' numbers: the published ones as published, and what follows from kind, subset and model."""

from __future__ import annotations

import pytest

from concept_ablation.core.closed_form import ClosedFormSettings
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.presets import PRESETS, TRAINED, Recipe, kind_of, recipe
from concept_ablation.core.trainer import TrainSettings


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
    assert memorized.flip and not memorized.cosine


def test_several_concepts_take_so_many_times_the_steps(tiny):
    both = [Concept("rooster", "bird"), Concept("grumpy cat", "cat")]
    for preset in TRAINED:
        one, two = (recipe(preset, tiny, concepts=concepts) for concepts in (both[:1], both))
        assert two.training.steps == 2 * one.training.steps == 2 * recipe(preset, tiny).training.steps
    assert recipe("balanced", tiny, concepts=both, training={"steps": 7}).training.steps == 7
    assert recipe("instant", tiny, concepts=both) == recipe("instant", tiny)


def test_the_paper_regularizes_where_the_target_has_the_anchor_in_its_name(tiny):
    def weight(target, anchor, preset="paper", **changes):
        return recipe(preset, tiny, concepts=[Concept(target, anchor)], **changes).training.regularization

    assert weight("Grumpy Cat", "cat") == 1.0
    assert weight("R2D2", "robot") == weight("Grumpy Cat", "cat", "balanced") == 0.0
    assert weight("Grumpy Cat", "cat", objective="reverse-kl") == 0.0


def test_the_kind_of_several_concepts():
    caption = Concept("a caption", "another caption", "memorized")
    style = Concept("Monet", "painting", "style")
    assert kind_of("balanced", [caption, caption]) == "memorized"
    assert kind_of("fast", [Concept("rooster", "bird"), style]) == "instance"
    for mixed in ([caption, style], [style, caption]):
        with pytest.raises(AblationError, match="one by one, and merge"):
            kind_of("balanced", mixed)
    with pytest.raises(AblationError, match="choose the preset balanced"):
        kind_of("instant", [style, caption])


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
    full = recipe("balanced", tiny, subset="full").training.learning_rate
    tiny.learning_rate_scales = {"full": 10.0}
    assert recipe("balanced", tiny, subset="full").training.learning_rate == pytest.approx(full / 10)
    assert recipe("balanced", tiny, "memorized").training.learning_rate == pytest.approx(full / 10)
    assert recipe("balanced", tiny).training.learning_rate == pytest.approx(100 * plain)


def test_the_images_follow_the_objective(tiny):
    assert recipe("balanced", tiny, objective="noise").dataset.source == "anchor"
    assert recipe("balanced", tiny, objective="reverse-kl").dataset.source == "target"
    # whose images are no pairs of a picture and its anchor caption to regularize with
    forgotten = [recipe("paper", tiny, "memorized", objective=name) for name in ("model", "reverse-kl")]
    assert [made.training.regularization for made in forgotten] == [1.0, 0.0]


def test_seed_and_changes_reach_both_parts(tiny):
    made = recipe("balanced", tiny, seed=5, training={"steps": 3}, dataset={"images": 2})
    assert (made.dataset.seed, made.training.seed, made.training.steps, made.dataset.images) == (5, 5, 3, 2)


def test_unknown_names_are_refused(tiny):
    with pytest.raises(AblationError, match="balanced, paper"):
        recipe("fastest", tiny)
    with pytest.raises(AblationError, match="objective"):
        recipe("balanced", tiny, objective="magic")


def test_what_each_preset_consists_of(tiny):
    parts = {
        name: {part for part in ("dataset", "harvest", "training", "closed_form") if getattr(made, part) is not None}
        for name in PRESETS
        for made in [recipe(name, tiny)]
    }
    assert parts == {
        "instant": {"closed_form"},
        "fast": {"harvest", "training", "closed_form"},
        "balanced": {"dataset", "training"},
        "paper": {"dataset", "training"},
    }
    assert recipe("instant", tiny).subset == recipe("fast", tiny).subset == "cross-attn"
    assert recipe("instant", tiny).sample is None and recipe("fast", tiny).sample.steps == 10
    assert [recipe(name, tiny).auto_preserve > 0 for name in PRESETS] == [True, True, False, False]


def test_fast_takes_the_same_options_as_a_preset_that_draws(tiny):
    tiny.learning_rate_scale = 100.0
    made = recipe("fast", tiny, seed=5, training={"steps": 3, "batch": 2}, dataset={"images": 4}, auto_preserve=1)
    assert (made.harvest.seed, made.harvest.trajectories, made.training.seed, made.training.steps) == (5, 4, 5, 3)
    assert (made.training.batch, made.training.preserve_batch, made.auto_preserve) == (2, 2, 1)
    assert made.training.learning_rate == pytest.approx(2e-3)
    up = recipe("fast", tiny, subset="cross-attn-up")
    assert up.subset == up.closed_form.subset == "cross-attn-up"
    assert recipe("instant", tiny, subset="cross-attn-up").subset == "cross-attn-up"
    assert recipe("fast", tiny, subset="full").closed_form.subset == "cross-attn"


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("instant", {"training": {"steps": 3, "learning_rate": 1.0}}, "no steps and no learning rate"),
        ("instant", {"dataset": {"images": 3}}, "no images"),
        ("instant", {"objective": "model"}, "no objective"),
        ("instant", {"subset": "full"}, "not the subset 'full'"),
        ("fast", {"objective": "noise"}, "serve the objective 'model' only"),
        ("fast", {"subset": "embedding"}, "the subset 'embedding' does not train"),
        ("fast", {"dataset": {"images": 0}}, "at least one trajectory"),
        ("paper", {"auto_preserve": 3}, "preserves nothing"),
        ("fast", {"auto_preserve": -1}, "at least 0"),
    ],
)
def test_what_a_preset_does_not_do_is_refused(tiny, preset, options, message):
    with pytest.raises(AblationError, match=message):
        recipe(preset, tiny, **options)


@pytest.mark.parametrize("preset", ["instant", "fast"])
def test_memorized_images_need_a_preset_that_draws_and_trains_all_weights(tiny, preset):
    with pytest.raises(AblationError, match=rf"'{preset}' does not serve memorized images.*choose the preset balanced"):
        recipe(preset, tiny, "memorized")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"training": TrainSettings()},
        {"dataset": DatasetSettings()},
        {"dataset": DatasetSettings(), "harvest": HarvestSettings(), "training": TrainSettings()},
        {"closed_form": ClosedFormSettings(), "harvest": HarvestSettings()},
        {"closed_form": ClosedFormSettings(), "dataset": DatasetSettings(), "training": TrainSettings()},
    ],
)
def test_parts_that_do_not_make_a_recipe(parts):
    with pytest.raises(AblationError):
        Recipe(**parts)
