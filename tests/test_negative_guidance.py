"""Negative guidance: what the teacher says, in training, harvests, the closed form, presets and the benchmark."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from concept_ablation.core import dataset, harvest
from concept_ablation.core.bench import plan
from concept_ablation.core.bench.experiments import Selection, plan_jobs
from concept_ablation.core.bench.pace import dataset_rows, training_rows
from concept_ablation.core.bench.plan import Edit, Fingerprints, Method, Protocol, edit_key, recipe_of
from concept_ablation.core.closed_form import ClosedFormSettings, solution
from concept_ablation.core.concept import Concept
from concept_ablation.core.dataset import DatasetSettings
from concept_ablation.core.errors import AblationError
from concept_ablation.core.harvest import HarvestSettings
from concept_ablation.core.harvest_training import train_harvested
from concept_ablation.core.losses import guided_away
from concept_ablation.core.presets import PRESETS, Recipe, guided, recipe
from concept_ablation.core.samplers import SampleSettings
from concept_ablation.core.tasks import ListedTask
from concept_ablation.core.trainer import FROZEN_TEACHER, OBJECTIVES, TrainSettings, train

CAT = Concept("grumpy cat", "cat")
NAME = "negative_guidance"
SAMPLE = SampleSettings(steps=3, guidance=2.0)
TRAIN = TrainSettings(steps=1, batch=4, preserve_batch=2, learning_rate=1e-3)


def test_the_prediction_goes_beyond_the_anchor():
    anchor, target = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert guided_away(anchor, target, 0.5).tolist() == [0.0, 2.0]
    assert torch.equal(guided_away(anchor, target, 0.0), anchor)


@pytest.mark.parametrize("objective", FROZEN_TEACHER)
def test_an_untrained_student_is_as_much_farther_from_its_teacher(tiny, objective):
    """It is the target's own prediction t, and t - (a + eta (a - t)) = (1 + eta) (t - a)."""
    source = "target" if objective == "reverse-kl" else "anchor"
    data = dataset.build(tiny, [CAT], DatasetSettings(images=6, preserve=3, prompts=4, sample=SAMPLE, source=source))
    settings = replace(TRAIN, objective=objective)
    plain, guided_by_two = (train(tiny, data, replace(settings, negative_guidance=eta)).losses[0] for eta in (0.0, 2.0))
    assert plain > 0 and guided_by_two == pytest.approx(9 * plain, rel=1e-3)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in FROZEN_TEACHER])
def test_an_objective_without_a_frozen_teacher_refuses_it(tiny, objective):
    with pytest.raises(AblationError, match="asks no frozen model"):
        TrainSettings(objective=objective, negative_guidance=1.0)
    assert recipe("balanced", tiny, objective=objective).training.negative_guidance == 0


@pytest.mark.parametrize("eta", [-1.0, float("nan"), float("inf")])
def test_what_is_no_guidance_is_refused(eta):
    for settings in (TrainSettings, HarvestSettings, ClosedFormSettings):
        with pytest.raises(AblationError):
            settings(negative_guidance=eta)


@torch.no_grad()
def test_harvested_rows_that_ablate_are_guided_and_others_are_not(tiny):
    settings = HarvestSettings(trajectories=3, preserve=2, prompts=3, sample=SAMPLE, keep=(0, 2), batch=4)
    plain, away = (
        harvest.harvest(tiny, [CAT], replace(settings, negative_guidance=eta), surrounding=[["dog"]])
        for eta in (0.0, 1.5)
    )
    assert torch.equal(plain.x, away.x) and torch.equal(plain.sigma, away.sigma)
    held, ablating = plain.preserving, ~plain.preserving
    assert torch.equal(plain.prediction[held], away.prediction[held])
    targets = [plain.plan.prompts[target] for _, target in plain.pairs.tolist()]
    target = tiny.direction(plain.x, plain.sigma, tiny.encode(targets))
    expected = guided_away(plain.prediction.float(), target, 1.5)
    torch.testing.assert_close(away.prediction[ablating].float(), expected[ablating], atol=2e-3, rtol=2e-3)
    assert (expected - plain.prediction.float())[ablating].abs().max() > 0.01
    with pytest.raises(AblationError, match="is the harvest's"):
        train_harvested(tiny, away, replace(TRAIN, negative_guidance=1.0))


def test_in_closed_form_it_is_strength(tiny):
    """What is held is met whatever the goal of the rest, and the solution is linear in the goal."""
    settings = ClosedFormSettings(prompts=4, preserve_prompts=4)
    plain, away = (
        solution(tiny, [CAT], replace(settings, negative_guidance=eta), surrounding=[["dog"]]) for eta in (0.0, 0.5)
    )
    for name, layer in plain.layers.items():
        torch.testing.assert_close(away.layers[name].weight, 1.5 * layer.weight, atol=1e-6, rtol=1e-4)
    assert plain.norm() > 0


def test_a_recipe_has_it_wherever_the_pretrained_model_is_asked(tiny):
    for name in PRESETS:
        made = recipe(name, tiny, objective="model" if name == "paper" else None, negative_guidance=0.7)
        where = {"instant": ["closed_form"], "fast": ["closed_form", "harvest"]}.get(name, ["training"])
        parts = {
            part: asdict(getattr(made, part)) for part in ("closed_form", "harvest", "training") if getattr(made, part)
        }
        assert [part for part, settings in parts.items() if settings.get(NAME)] == where
        assert guided(made, 0.0) == recipe(
            name, tiny, objective="model" if name == "paper" else None, negative_guidance=0
        )
    with pytest.raises(AblationError, match="asks no frozen model"):
        recipe("paper", tiny, negative_guidance=1.0)


def test_the_paper_and_memorized_images_have_none_and_the_others_half(tiny):
    others = [recipe(name, tiny) for name in PRESETS if name != "paper"]
    assert others == [guided(made, 0.5) for made in others]
    assert recipe("paper", tiny).training.negative_guidance == 0
    assert recipe("balanced", tiny, "memorized").training.negative_guidance == 0


def test_rows_through_the_network_count_it(tiny):
    balanced, fast = (recipe(name, tiny, negative_guidance=0.0) for name in ("balanced", "fast"))
    more = training_rows(guided(balanced, 1.0)) - training_rows(balanced)
    assert more == balanced.training.steps * balanced.training.batch
    more = dataset_rows(guided(fast, 1.0), 2) - dataset_rows(fast, 2)
    assert more == 2 * fast.harvest.trajectories * len(fast.harvest.kept)


def test_results_of_before_it_came_are_results_still(tiny, monkeypatch):
    """Their keys were made of recipes without the field, and without another one that came later."""
    edit = Edit((ListedTask("cat", CAT, ("dog",)),), Method(negative_guidance=0.0))
    made, tools = recipe_of(edit, tiny, Protocol()), Fingerprints("model", ("judge",))

    def key(eta: float) -> str:
        return edit_key(edit, guided(made, eta), tools, Protocol())

    keys = {eta: key(eta) for eta in (0.0, 0.5, 1.0)}
    assert len(set(keys.values())) == 3

    later = set(plan._LATER)

    def older(value: object) -> dict:
        told = asdict(value)
        training = {name: value for name, value in told["training"].items() if name not in later}
        return {**told, "training": training}

    monkeypatch.setattr(plan, "asdict", lambda value: older(value) if isinstance(value, Recipe) else asdict(value))
    monkeypatch.setattr(plan, "_LATER", {})
    assert key(0.0) == keys[0.0]


def test_objectives_are_compared_without_it(tiny):
    task = ListedTask("cat", CAT, ("dog",))
    jobs = plan_jobs(["objectives"], Selection((task,), (Method(),)))["objectives"]
    assert {recipe_of(job.edit, tiny, Protocol()).training.negative_guidance for job in jobs} == {0.0}
