"""How sure a figure is: bootstrap intervals of means and shares, and of the difference or ratio of two of them.

Images of one prompt resemble each other, so what is resampled is prompts, each with all of its images (the cluster
bootstrap: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). Ten prompts are few: the
plain percentile interval of ten clusters is about 15 % too narrow. Its percentiles are therefore moved outwards by the
ratio of Student's t to the normal distribution (the expanded percentile interval: Hesterberg, "What Teachers Should
Know About the Bootstrap", 2015, section 4.2, https://arxiv.org/abs/1411.5279).

Intervals are of 95 %; all numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHOICES_AT_ONCE = 1_000_000
"""Largest number of clusters that are drawn at once, 8 MB of indices."""

Groups = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the ends are NaN where the data cannot give one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Clusters:
    """Sum and number of the values of each cluster, float64 [G]."""

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.sizes.sum())

    def means(self, chosen: np.ndarray) -> np.ndarray:
        """Means of resamples that are made of the clusters `chosen`, int64 [R, G]: float64 [R]."""
        return self.sums[chosen].sum(axis=1) / self.sizes[chosen].sum(axis=1)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `values` [N >= 1].

    Args:
        values: one figure per image.
        groups: what each value belongs to, such as its prompt, [N]; None where all values are independent.
        resamples: bootstrap samples.
        seed: of the numpy Generator that draws them.

    Returns:
        An estimate without an interval where there is only one group: it cannot show how groups differ. Values that
        are all equal give an interval of no width.
    """
    clusters = _clusters(values, groups)
    found = _resample((clusters,), resamples, seed)
    return _estimate(clusters.mean, found[0], len(clusters.sizes))


def share_interval(
    hits: Sequence[bool] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of `hits` that are true; arguments as for `mean_interval`.

    Where none or all are true, resampling finds nothing else, and claiming certainty would be wrong. The interval then
    reaches as far as `unseen_share`, for the prompts that were drawn: N counts images, since the seeds of one prompt
    are independent.
    """
    share = np.asarray(hits, dtype=bool)
    if share.any() and not share.all():
        return mean_interval(share, groups, resamples=resamples, seed=seed)
    return _widened(_clusters(share, groups).mean, unseen_share(len(share)), 0.0, 1.0)


def unseen_share(images: int) -> float:
    """The rate that leaves all of N images alike with 5 % probability (the exact form of the rule of three)."""
    return 1 - (1 - CONFIDENCE) ** (1 / images)


def difference_interval(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `second` minus the mean of `first`, whose i-th values have the same prompt and seed.

    Args:
        first: one figure per image, such as before an edit, [N].
        second: the same after it, [N].
        groups: the group of each pair, as in `mean_interval`.
        resamples: bootstrap samples, of pairs.
        seed: of the numpy Generator that draws them.

    Raises:
        ValueError: the lengths differ.
    """
    return _compare(np.subtract, first, second, groups, resamples, seed)


def ratio_interval(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `second` divided by the mean of `first`; otherwise as `difference_interval`.

    Infinite where only the mean of `first` is 0, NaN where both are; resamples of the latter kind are left out.
    """
    return _compare(np.divide, first, second, groups, resamples, seed)


def share_difference(
    first: Sequence[bool] | np.ndarray,
    second: Sequence[bool] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of `second` that is true minus that of `first`; otherwise as `difference_interval`.

    Where every prompt has the same difference, as when all pictures are hits before and none is after, resampling finds
    nothing else. As in `share_interval`, the interval then reaches as far as pictures of another sort may have gone
    unseen.
    """
    hits = [np.asarray(values, dtype=bool) for values in (first, second)]
    found = difference_interval(*hits, groups, resamples=resamples, seed=seed)
    if not _certain(found):
        return found
    return _widened(found.value, unseen_share(len(hits[0])), -1.0, 1.0)


def share_ratio(
    first: Sequence[bool] | np.ndarray,
    second: Sequence[bool] | np.ndarray,
    groups: Groups | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of `second` that is true divided by that of `first`, as `ratio_interval`; where every prompt has the
    same ratio, the interval is widened as in `share_difference`.
    """
    hits = [np.asarray(values, dtype=bool) for values in (first, second)]
    found = ratio_interval(*hits, groups, resamples=resamples, seed=seed)
    if not (_certain(found) and math.isfinite(found.value)):
        return found
    margin = unseen_share(len(hits[0])) / float(hits[0].mean())
    return _widened(found.value, margin, 0.0, math.inf)


def group_index(groups: Groups, count: int) -> np.ndarray:
    """`groups` as int64 [count], numbered in the order in which they first occur.

    Raises:
        ValueError: there are not `count` of them.
    """
    labels = list(groups)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} groups for {count} values")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def _compare(
    operation: Callable[[np.ndarray, np.ndarray], np.ndarray],
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    groups: Groups | None,
    resamples: int,
    seed: int,
) -> Estimate:
    """`operation` on the means of `second` and `first`, whose i-th values are resampled together."""
    if len(first) != len(second):
        raise ValueError(f"paired values need two equal lengths, not {len(first)} and {len(second)}")
    one, other = _clusters(first, groups), _clusters(second, groups)
    before, after = _resample((one, other), resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(operation(np.float64(other.mean), np.float64(one.mean)))
        return _estimate(value, operation(after, before), len(one.sizes))


def _certain(found: Estimate) -> bool:
    """Whether an interval has no width, but for what rounding gives it."""
    return math.isclose(found.low, found.high, abs_tol=1e-9)


def _widened(value: float, margin: float, least: float, most: float) -> Estimate:
    """An interval of so much on either side, within what is possible."""
    return Estimate(value, max(least, value - margin), min(most, value + margin))


def _clusters(values: Sequence[float] | np.ndarray, groups: Groups | None) -> _Clusters:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be finite, one dimension, at least one; got shape {array.shape}")
    if groups is None:
        return _Clusters(array, np.ones_like(array))
    index = group_index(groups, len(array))
    return _Clusters(np.bincount(index, weights=array), np.bincount(index).astype(np.float64))


def _resample(samples: Sequence[_Clusters], resamples: int, seed: int) -> list[np.ndarray]:
    """Means of `samples`, which have G clusters each and are resampled together, each [resamples]."""
    rng = np.random.default_rng(seed)
    count = len(samples[0].sizes)
    step = max(1, _CHOICES_AT_ONCE // count)
    found: list[list[np.ndarray]] = [[] for _ in samples]
    for start in range(0, resamples, step):
        chosen = rng.integers(count, size=(min(step, resamples - start), count))
        for means, clusters in zip(found, samples, strict=True):
            means.append(clusters.means(chosen))
    return [np.concatenate(means) for means in found]


def _estimate(value: float, resampled: np.ndarray, clusters: int) -> Estimate:
    """`value` with the expanded percentiles of what resampling `clusters` clusters found."""
    defined = resampled[~np.isnan(resampled)]
    if clusters < 2 or math.isnan(value) or len(defined) == 0:
        return Estimate(value, math.nan, math.nan)
    quantile = _student((1 + CONFIDENCE) / 2, clusters - 1) * math.sqrt(clusters / (clusters - 1))
    tail = NormalDist().cdf(-quantile)
    # An order statistic and no mix of two, which would turn an infinite ratio beside a finite one into NaN.
    low, high = np.quantile(defined, [tail, 1 - tail], method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def _student(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, `probability` > 0.5.

    Exact for 1 and 2 degrees of freedom; above, the Cornish-Fisher expansion (Abramowitz and Stegun 1964, 26.7.5), at
    97.5 % within 0.2 % of the true value.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        centred = 2 * probability - 1
        return centred * math.sqrt(2 / (1 - centred**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
