"""The figures of one concept with their 95 % intervals: accuracy and score before and after an edit, their change, how
far the pictures moved as a set, and how many of them copy a memorized image.

Pictures come as [prompts, seeds]; what is resampled is prompts, because seeds of one prompt resemble each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from .copies import copies
from .instruments import Instruments
from .kid import Kid, kid, spherical
from .metrics import clip_hits, clip_scores
from .statistics import Estimate, difference_interval, mean_interval, share_difference, share_interval


@dataclass(frozen=True)
class CopyDetails:
    """How often and how closely the pictures copy the memorized image; the change is after minus before."""

    rate_before: Estimate
    """Share of the pictures that are copies (`copies.COPY_THRESHOLD`), in [0, 1]."""
    rate_after: Estimate
    rate_change: Estimate
    similarity_before: Estimate
    """Mean similarity to the image, in [-1, 1]."""
    similarity_after: Estimate


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
    kid_copy: Kid | None = None
    """The same over a copy detector's features; None without one."""
    kid_inception: Kid | None = None
    """The same over Inception features; None without their network."""
    copies: CopyDetails | None = None
    """None where no memorized image was given."""


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
        accuracy_change=share_difference(*hits, groups),
        score_before=mean_interval(scores[0], groups),
        score_after=mean_interval(scores[1], groups),
        score_change=difference_interval(*scores, groups),
        kid_clip=_distance(before, after, groups),
    )


def with_instruments(
    details: ConceptDetails,
    before: np.ndarray,
    after: np.ndarray,
    prompts: int,
    instruments: Instruments,
    original: np.ndarray | None,
) -> ConceptDetails:
    """`details` with what `instruments` find in the same pictures.

    Args:
        details: what the judge found.
        before: uint8 [prompts * seeds, height, width, 3], prompt by prompt, without the edit.
        after: the same with it.
        prompts: how many prompts there are.
        instruments: whatever there is.
        original: the memorized image, uint8 [height, width, 3]; None where the concept has none.
    """
    groups = np.repeat(np.arange(prompts), len(before) // prompts)
    if instruments.inception is not None:
        features = (instruments.inception(images) for images in (before, after))
        details = replace(details, kid_inception=_kid(*features, groups))
    if instruments.detector is None:
        return details
    first, second = (instruments.detector.embed(images) for images in (before, after))
    details = replace(details, kid_copy=_distance(first, second, groups))
    if original is None:
        return details
    known = instruments.detector.embed(original[None])
    return replace(details, copies=copy_details(first @ known.t(), second @ known.t(), groups))


def copy_details(before: Tensor, after: Tensor, groups: np.ndarray) -> CopyDetails:
    """Copy rates from similarities to the originals, [N, originals], before and after; `groups` [N] are the prompts."""
    hits = [copies(similar) for similar in (before, after)]
    nearest = [similar.amax(dim=1).double().numpy() for similar in (before, after)]
    return CopyDetails(
        rate_before=share_interval(hits[0], groups),
        rate_after=share_interval(hits[1], groups),
        rate_change=share_difference(*hits, groups),
        similarity_before=mean_interval(nearest[0], groups),
        similarity_after=mean_interval(nearest[1], groups),
    )


def _distance(before: Tensor, after: Tensor, groups: np.ndarray) -> Kid:
    return _kid(spherical(before), spherical(after), groups)


def _kid(before: Tensor, after: Tensor, groups: np.ndarray) -> Kid:
    if len(before) < 2:
        return Kid(float("nan"), float("nan"))
    return kid(before, after, groups)
