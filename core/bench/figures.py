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

from ..statistics import (
    RESAMPLES,
    Estimate,
    difference_interval,
    mean_interval,
    ratio_interval,
    share_interval,
    unseen_share,
)
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
        """One bool for each picture "before" or "after", and its cluster."""
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
    return _paired(difference_interval, found, resamples)


def kept(found: Pool, resamples: int = RESAMPLES) -> Estimate | None:
    """After divided by before."""
    return _paired(ratio_interval, found, resamples)


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
    estimate = change(paired)
    if estimate is not None and estimate.low == estimate.high:
        # all alike: resampling finds nothing else, which is no certainty (as in `share_interval`)
        margin = unseen_share(paired.images)
        estimate = Estimate(estimate.value, max(-1.0, estimate.low - margin), min(1.0, estimate.high + margin))
    return estimate, Pool({key: other for key, (_, other) in common.items()})


def mean_score(measured: Iterable[Measured], measure: str, judge: str | None, roles: Iterable[str]) -> Estimate | None:
    """Mean cosine after the edit, over prompts."""
    wanted, values, groups = set(roles), [], []
    for one in measured:
        for seen in one.observations:
            if seen.measure == measure and seen.judge == judge and seen.role in wanted and seen.score_after:
                values += seen.score_after
                groups += [(one.task, seen.role, seen.name, prompt) for prompt in seen.prompts]
    return mean_interval(values, groups, resamples=FEW_RESAMPLES) if values else None


def mean_kid(measured: Iterable[Measured], judge: str | None, roles: Iterable[str]) -> float | None:
    """Mean kernel distance between the pictures before and after; of each name it has its own error."""
    wanted = set(roles)
    values = [
        seen.kid
        for one in measured
        for seen in one.observations
        if seen.measure == ACCURACY and seen.judge == judge and seen.role in wanted and seen.kid is not None
    ]
    return sum(values) / len(values) if values else None


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
    return interval(first.astype(float), second.astype(float), groups, resamples=resamples)
