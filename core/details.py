"""The figures of one concept with their 95 % intervals: accuracy and score before and after an edit, their change, and
how far the pictures moved as a set.

Pictures come as [prompts, seeds]; what is resampled is prompts, because seeds of one prompt resemble each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .kid import Kid, kid, spherical
from .metrics import clip_hits, clip_scores
from .statistics import Estimate, difference_interval, mean_interval, share_interval


@dataclass(frozen=True)
class ConceptDetails:
    """Estimates for one concept; those of a change are after minus before, over the same prompts and seeds."""

    accuracy_before: Estimate
    accuracy_after: Estimate
    accuracy_change: Estimate
    score_before: Estimate
    score_after: Estimate
    score_change: Estimate
    kid_clip: Kid
    """Kernel distance of the pictures before and after, over the judge's features: 0 for an edit without effect."""


def measure(before: Tensor, after: Tensor, concept: Tensor, other: Tensor, prompts: int) -> ConceptDetails:
    """Compare the judge's embeddings of a concept's pictures.

    Args:
        before: of the pictures without the edit, [prompts * seeds, D], prompt by prompt.
        after: of those with it, in the same order.
        concept: embedding of the concept, [D].
        other: embedding of what it is told from, [D].
        prompts: how many prompts there are.
    """
    groups = np.repeat(np.arange(prompts), len(before) // prompts)
    hits = [clip_hits(images, concept, other).numpy() for images in (before, after)]
    scores = [clip_scores(images, concept).double().numpy() for images in (before, after)]
    return ConceptDetails(
        accuracy_before=share_interval(hits[0], groups),
        accuracy_after=share_interval(hits[1], groups),
        accuracy_change=difference_interval(*hits, groups),
        score_before=mean_interval(scores[0], groups),
        score_after=mean_interval(scores[1], groups),
        score_change=difference_interval(*scores, groups),
        kid_clip=_distance(before, after, groups),
    )


def _distance(before: Tensor, after: Tensor, groups: np.ndarray) -> Kid:
    if len(before) < 2:
        return Kid(float("nan"), float("nan"))
    return kid(spherical(before), spherical(after), groups, paired=True)
