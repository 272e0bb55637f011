"""Figures with 95 % intervals, pooled over the observations of several jobs.

What is resampled is prompts (`core/statistics.py`): the pictures of one prompt of one name of one task are a cluster,
also where they come from several training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kid import Kid
from ..statistics import RESAMPLES, Estimate, mean_interval, share_difference, share_interval, share_ratio
from .measures import Observation

FEW_RESAMPLES = 2_000
"""For figures of single jobs, of which there are thousands and on which no conclusion rests."""
COPIES = "copies"
ACCURACY = "accuracy"
TARGET, SURROUNDING = ("target",), ("surrounding",)
CAPTION = ("target", "misspelled", "paraphrase")
"""Roles by which a memorized picture is asked for."""

Cluster = tuple[str, str, str, str]
"""(task, role, name, prompt)"""


@dataclass(frozen=True)
class Measured:
    """The result of one job, as one experiment calls it."""

    experiment: str
    task: str
    kind: str
    method: str
    """Its label."""
    subset: str | None
    objective: str | None
    seed: int | None
    step: int | None
    anchor: str
    own_anchor: bool
    """Whether that is the anchor of the task list."""
    joint: int
    """How many concepts the edit ablates."""
    observations: tuple[Observation, ...]
    result: Mapping[str, Any]
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Pictures of one prompt with some property, of one job."""

    before: int
    after: int
    images: int


@dataclass(frozen=True)
class Pool:
    """Counts by cluster; of each cluster by what else tells its jobs apart (seed, step)."""

    counts: Mapping[tuple[Cluster, tuple[int, int]], Counts]

    def __bool__(self) -> bool:
        return bool(self.counts)

    @property
    def images(self) -> int:
        """How many pictures after the edit."""
        return sum(one.images for one in self.counts.values())

    @property
    def tasks(self) -> int:
        """Of how many tasks."""
        return len({cluster[0] for cluster, _ in self.counts})

    def hits(self, when: str) -> tuple[np.ndarray, list[Cluster]]:
        """Whether each picture "before" or "after" has the property, bool [images], and the cluster of each."""
        values, groups = [], []
        for (cluster, _), one in self.counts.items():
            count = one.before if when == "before" else one.after
            values += [True] * count + [False] * (one.images - count)
            groups += [cluster] * one.images
        return np.array(values, dtype=bool), groups


def pool(measured: Iterable[Measured], measure: str, judge: str | None, roles: Iterable[str]) -> Pool:
    """All observations of some jobs by one measure, one judge and of some roles."""
    wanted, counts = set(roles), {}
    for one in measured:
        for seen in one.observations:
            if seen.measure != measure or seen.judge != judge or seen.role not in wanted:
                continue
            for place, prompt in enumerate(seen.prompts):
                cluster = (one.task, seen.role, seen.name, prompt)
                variant = (one.seed or 0, one.step or 0)
                counts[cluster, variant] = Counts(seen.before[place], seen.after[place], seen.images)
    return Pool(dict(sorted(counts.items())))


def share(found: Pool, when: str = "after", resamples: int = RESAMPLES) -> Estimate | None:
    """The share of pictures with the property, or None where nothing was measured."""
    return share_interval(*found.hits(when), resamples=resamples) if found else None


def change(found: Pool, resamples: int = RESAMPLES) -> Estimate | None:
    """After minus before."""
    return _paired(share_difference, found, resamples)


def kept(found: Pool, resamples: int = RESAMPLES) -> Estimate | None:
    """After divided by before."""
    return _paired(share_ratio, found, resamples)


def difference(first: Pool, second: Pool) -> tuple[Estimate | None, Pool]:
    """The share after the edits of `second` minus that after those of `first`, over what both measured; and `second` as
    far as that goes.
    """
    common = {
        key: (first.counts[key], one)
        for key, one in second.counts.items()
        if key in first.counts and first.counts[key].images == one.images
    }
    paired = Pool({key: Counts(one.after, other.after, other.images) for key, (one, other) in common.items()})
    return change(paired), Pool({key: other for key, (_, other) in common.items()})


def floor(measured: Iterable[Measured], judge: str | None) -> float | None:
    """Which share of the pretrained model's pictures of the anchor a judge takes for the target: the target accuracy of
    an edit that draws just those in the target's place. None where none were measured.
    """
    anchors = share(pool(measured, ACCURACY, judge, ("anchor",)), "before", FEW_RESAMPLES)
    return None if anchors is None else round(1 - anchors.value, 4)


def mean_score(
    measured: Iterable[Measured], measure: str, judge: str | None, roles: Iterable[str], when: str = "after"
) -> Estimate | None:
    """Mean cosine "before" or "after" the edit, over prompts."""
    wanted, values, groups = set(roles), [], []
    for one in measured:
        for seen in one.observations:
            scores = seen.score_before if when == "before" else seen.score_after
            if seen.measure == measure and seen.judge == judge and seen.role in wanted and scores:
                values += scores
                groups += [(one.task, seen.role, seen.name, prompt) for prompt in seen.prompts]
    return mean_interval(values, groups, resamples=FEW_RESAMPLES) if values else None


def mean_kid(measured: Iterable[Measured], judge: str | None, roles: Iterable[str]) -> Kid | None:
    """Mean kernel distance between the pictures before and after, over names, whose errors are independent."""
    wanted = set(roles)
    found = [
        (seen.kid, math.nan if seen.kid_error is None else seen.kid_error)
        for one in measured
        for seen in one.observations
        if seen.measure == ACCURACY and seen.judge == judge and seen.role in wanted and seen.kid is not None
    ]
    if not found:
        return None
    values, errors = zip(*found, strict=True)
    return Kid(sum(values) / len(found), math.hypot(*errors) / len(found))


def as_json(estimate: Estimate | None, images: int | None = None) -> dict[str, Any] | None:
    """An estimate as results.json has it; numbers that JSON cannot hold are null."""
    if estimate is None:
        return None
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    plain: dict[str, Any] = {
        name: round(number, 4) if math.isfinite(number) else None for name, number in numbers.items()
    }
    return plain if images is None else {**plain, "n": images}


def _paired(interval: Callable[..., Estimate], found: Pool, resamples: int) -> Estimate | None:
    if not found:
        return None
    first, groups = found.hits("before")
    second, _ = found.hits("after")
    return interval(first, second, groups, resamples=resamples)
