"""A concept's figures with intervals, on embeddings whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from concept_ablation.core.details import copy_details, measure
from concept_ablation.core.kid import kid, spherical
from concept_ablation.core.statistics import difference_interval, mean_interval, share_interval

CONCEPT, OTHER = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
BOTH = torch.tensor([math.sqrt(0.5), math.sqrt(0.5)])


def pictures(*hits: int) -> torch.Tensor:
    return torch.stack([CONCEPT if hit else OTHER for hit in hits])


def test_figures_are_means_over_pictures_and_intervals_are_over_prompts():
    before, after = pictures(1, 1, 1, 1, 1, 0), pictures(1, 1, 0, 0, 0, 0)
    found = measure(before, after, CONCEPT, OTHER, prompts=3)
    assert found.accuracy_before.value == pytest.approx(5 / 6)
    assert found.accuracy_after == share_interval([1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])
    assert found.accuracy_change.value == pytest.approx(-0.5)
    groups, hits = [0, 0, 1, 1, 2, 2], ([1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0])
    assert found.accuracy_change == difference_interval(*hits, groups)
    # the cosine of these pictures is 1 or 0
    assert (found.score_after, found.score_change) == (
        mean_interval(hits[1], groups),
        difference_interval(*hits, groups),
    )
    assert found.kid_clip == kid(spherical(before), spherical(after), groups)


def test_copies_are_those_of_before_and_of_after_with_intervals_over_prompts():
    before, after = torch.tensor([[0.9], [0.7], [0.2], [0.1]]), torch.tensor([[0.6], [0.2], [0.1], [0.3]])
    groups = np.array([0, 0, 1, 1])
    found = copy_details(before, after, groups)
    assert found.rate_change == difference_interval([1, 1, 0, 0], [1, 0, 0, 0], groups)
    values = after.flatten().double().numpy()
    assert found.similarity_after == mean_interval(values, groups)
    assert found.similarity_after.value == pytest.approx(0.3) and found.similarity_before.value == pytest.approx(0.475)


def test_a_removal_of_all_pictures_is_no_certain_one():
    found = measure(pictures(*[1] * 40), pictures(*[0] * 40), CONCEPT, OTHER, prompts=10)
    assert (found.accuracy_change.value, found.accuracy_change.low) == (-1, -1)
    assert found.accuracy_after.high > 0 and found.accuracy_change.high == found.accuracy_after.high - 1
    copied = copy_details(torch.ones(40, 1), torch.zeros(40, 1), np.arange(40) % 10)
    assert copied.rate_change == found.accuracy_change


def test_the_set_moves_only_if_the_pictures_do():
    before = pictures(1, 1, 1, 1, 0, 0)
    assert measure(before, before.clone(), CONCEPT, OTHER, 3).kid_clip.value == pytest.approx(0, abs=1e-9)
    moved = measure(before, pictures(0, 0, 0, 0, 0, 1), CONCEPT, OTHER, 3).kid_clip
    assert moved.value > 0.5


def test_a_tie_is_no_hit():
    found = measure(torch.stack([BOTH, BOTH]), pictures(1, 1), CONCEPT, OTHER, prompts=2)
    assert (found.accuracy_before.value, found.accuracy_after.value) == (0, 1)


def test_one_picture_has_figures_without_intervals():
    found = measure(pictures(1), pictures(0), CONCEPT, OTHER, prompts=1)
    assert found.score_change.value == -1 and math.isnan(found.score_change.low) and math.isnan(found.kid_clip.value)
