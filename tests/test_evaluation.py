"""Evaluation: who is drawn, with which prompts and seeds, and that before and after are told apart rightly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_ablation.core.concept import Concept, evaluation_prompts
from concept_ablation.core.delta import zeros
from concept_ablation.core.errors import AblationError
from concept_ablation.core.evaluation import EvaluationSettings, evaluate, roles
from concept_ablation.core.metrics import Judge
from concept_ablation.core.samplers import SampleSettings, draw_images
from concept_ablation.core.statistics import Estimate
from concept_ablation.core.subsets import select

SETTINGS = EvaluationSettings(prompts=2, seeds=2, sample=SampleSettings(steps=3), batch=5)
ROOSTER = Concept("rooster", "bird")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_roles_name_the_target_first_and_refuse_it_as_a_neighbour():
    assert roles(ROOSTER, ["owl", "owl"]) == [("rooster", "target"), ("bird", "anchor"), ("owl", "surrounding")]
    for name in ("Rooster", "bird"):
        with pytest.raises(AblationError, match="leave it out"):
            roles(ROOSTER, [name])


def test_a_delta_of_zeros_changes_nothing(emoji, judge):
    delta = zeros(select("cross-attn", emoji))
    found = evaluate(emoji, delta, [ROOSTER], [["owl"]], judge, SETTINGS)
    for row in found.concepts:
        assert row.before == row.after
        assert np.array_equal(row.images_before, row.images_after)
        assert row.images_before.shape == (2, 2, 128, 128, 3)
        details = row.details
        assert details.accuracy_before == details.accuracy_after and details.accuracy_change.value == 0
        assert details.accuracy_after.value == row.after.clip_accuracy
        assert details.score_change == Estimate(0.0, 0.0, 0.0)
        assert details.kid_clip.value == pytest.approx(0, abs=1e-9)


def test_images_come_from_the_stated_prompts_and_seeds_with_the_delta_on_only_after(emoji, judge):
    torch.manual_seed(0)
    delta = zeros(select("cross-attn", emoji)).map(lambda tensor: 0.2 * torch.randn_like(tensor))
    found = evaluate(emoji, delta, [ROOSTER], [["owl"]], judge, SETTINGS)
    owl = found.concepts[2]
    prompts = evaluation_prompts("owl", ROOSTER, emoji.prompt_source, 2)
    assert (owl.name, owl.role, owl.ablation, owl.prompts, owl.seeds) == (
        "owl",
        "surrounding",
        "rooster",
        prompts,
        (0, 1),
    )
    alone = draw_images(emoji, [prompts[1]], [1], SETTINGS.sample)[0]
    # bf16 kernels may round differently in another batch size
    assert np.abs(owl.images_before[1, 1].astype(int) - alone).mean() < 3
    assert np.abs(owl.images_after[1, 1].astype(int) - alone).mean() > 10
    with delta.attach(emoji):
        edited = draw_images(emoji, [prompts[1]], [1], SETTINGS.sample)[0]
    assert np.abs(owl.images_after[1, 1].astype(int) - edited).mean() < 3
    assert not any(module._forward_hooks for module in emoji.network.modules())


def test_settings_are_checked():
    with pytest.raises(AblationError, match="at least one prompt"):
        EvaluationSettings(prompts=0)
