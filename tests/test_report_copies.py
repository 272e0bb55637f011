"""What the report says of a memorized picture: copies decide, and the judge does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_ablation.core.concept import Concept
from concept_ablation.core.details import copy_details, measure
from concept_ablation.core.evaluation import ConceptResult, Role
from concept_ablation.core.report import ReportInputs, write_report
from concept_ablation.tests.test_report import Page, inputs, result

FAIR = Concept("the fair, 1931", "a rooster", "memorized")
PROMPTS, SEEDS = 2, 10


def compared(name: str, role: Role, before: int, after: int) -> ConceptResult:
    """A result of 20 pictures, so many of which are copies, and of which the judge takes every one for the caption."""
    plain = result(name, role, 1.0, 1.0, ablation=FAIR.target, prompts=PROMPTS, seeds=SEEDS)
    count, groups = PROMPTS * SEEDS, np.repeat(np.arange(PROMPTS), SEEDS)
    similar = [
        torch.tensor([[0.9] if index < copies else [0.1] for index in range(count)]) for copies in (before, after)
    ]
    alike = torch.eye(2)[torch.zeros(count, dtype=torch.long)]
    details = measure(alike, alike, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), PROMPTS)
    return replace(plain, details=replace(details, copies=copy_details(*similar, groups)))


def page(folder: Path, *results: ConceptResult) -> str:
    made: ReportInputs = inputs(*results, concepts=(FAIR,))
    return Page(write_report(folder, made)).text


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (20, 0, "no longer copies the memorised picture"),
        (20, 2, "hardly ever copies"),
        (20, 9, "The removal is partial"),
        (20, 12, "The removal did not succeed"),
        (0, 0, "None of the pictures of “the fair, 1931” was a copy"),
    ],
)
def test_the_verdict_is_of_copies(tmp_path, before, after, verdict):
    text = page(tmp_path, compared(FAIR.target, "target", before, after))
    assert verdict in text
    assert ("None of 20 pictures is not never: even for these requests a copy" in text) == (after == 0)


def test_copies_of_every_sort_of_prompt_are_told(tmp_path):
    text = page(
        tmp_path,
        compared(FAIR.target, "target", 20, 0),
        compared("a rooster", "anchor", 12, 10),
        compared(FAIR.target, "misspelled", 18, 1),
    )
    assert "caption 100% (" in text and "drawn instead 60% (" in text and "caption, misspelled 90% (" in text


def test_without_a_copy_detector_nothing_is_said_of_copies(tmp_path):
    text = page(tmp_path, result(FAIR.target, "target", 1.0, 0.0, ablation=FAIR.target))
    assert "cannot tell whether the memorised picture is still copied" in text
    assert "hardly ever" not in text
    # nor is the judge's opinion taken for a count of copies
    assert "is not never" not in text
