"""A concept's figures with intervals, on embeddings whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch

from concept_ablation.core.details import measure
from concept_ablation.core.statistics import share_interval

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
    assert found.accuracy_change.low < -0.5 < found.accuracy_change.high
    # the cosine of these pictures is 1 or 0
    assert found.score_after.value == pytest.approx(1 / 3) and found.score_change.value == pytest.approx(-0.5)


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
