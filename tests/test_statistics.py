from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from concept_ablation.core import statistics as module
from concept_ablation.core.statistics import (
    Estimate,
    difference_interval,
    group_index,
    mean_interval,
    ratio_interval,
    share_difference,
    share_interval,
    share_ratio,
    unseen_share,
)

RNG = np.random.default_rng(7)
T_975 = {4: 2.776445, 9: 2.262157, 199: 1.971957}
"""Printed tables of Student's t."""


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706205), (2, 4.302653), *T_975.items()])
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert module._student(0.975, degrees) == pytest.approx(quantile, rel=2e-3)


def test_interval_of_many_values_is_that_of_the_central_limit_theorem() -> None:
    values = RNG.normal(5, 2, 200)
    found = mean_interval(values, resamples=40_000)
    half = T_975[199] * values.std(ddof=1) / math.sqrt(200)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_agrees_with_scipy_on_what_resampling_does() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = RNG.exponential(1, 500)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    found = mean_interval(values, resamples=20_000)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.04 * width)
    assert found.high == pytest.approx(expected.high, abs=0.04 * width)


def test_all_resamples_of_a_small_sample() -> None:
    # With 5 clusters the tail is Phi(-sqrt(5/4) * 2.776) = 0.00095 of the 5^5 equally likely resamples.
    values = np.array([0.0, 1.0, 4.0, 9.0, 20.0])
    means = np.sort([np.mean(choice) for choice in product(values, repeat=5)])
    tail = 0.5 * math.erfc(math.sqrt(5 / 4) * T_975[4] / math.sqrt(2))
    found = mean_interval(values, resamples=200_000)
    assert means[int(0.7 * tail * 5**5)] <= found.low <= means[math.ceil(1.3 * tail * 5**5)]
    assert means[-math.ceil(1.3 * tail * 5**5) - 1] <= found.high <= means[-int(0.7 * tail * 5**5) - 1]


@pytest.mark.parametrize(("images", "rate"), [(200, 0.5), (200, 0.85), (60, 0.3)])
def test_intervals_of_independent_shares_hold_the_truth_95_times_in_100(images: int, rate: float) -> None:
    rng = np.random.default_rng(images)
    held = [
        found.low <= rate <= found.high
        for found in (share_interval(rng.random(images) < rate, resamples=1000, seed=turn) for turn in range(400))
    ]
    assert 0.92 <= np.mean(held) <= 0.98


def test_intervals_of_clustered_values_hold_the_truth_and_those_without_groups_do_not() -> None:
    # 10 prompts of 20 images, as in the paper's protocol; half of the variance is between prompts.
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(10), 20)
    grouped, blind = [], []
    for turn in range(400):
        values = rng.normal(0, 1, 10)[prompts] + rng.normal(0, 1, 200)
        for held, groups in ((grouped, prompts), (blind, None)):
            found = mean_interval(values, groups, resamples=1000, seed=turn)
            held.append(found.low <= 0 <= found.high)
    assert 0.92 <= np.mean(grouped) <= 0.98
    assert np.mean(blind) < 0.6


def test_groups_weigh_by_their_images() -> None:
    found = mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], resamples=2000)
    assert found.value == 0.75
    assert (found.low, found.high) == (0.0, 1.0)


def test_images_of_equal_prompts_add_no_certainty() -> None:
    means = RNG.normal(0, 1, 10)
    once = mean_interval(means)
    twenty = mean_interval(np.repeat(means, 20), np.repeat(np.arange(10), 20))
    assert (twenty.low, twenty.high) == pytest.approx((once.low, once.high))


def test_group_labels_may_be_anything_in_any_order() -> None:
    values = RNG.normal(0, 1, 40)
    numbers, names = np.arange(40) % 8, [f"prompt {index % 8}" for index in range(40)]
    order = RNG.permutation(40)
    assert mean_interval(values, numbers) == mean_interval(values, names)
    shuffled = mean_interval(values[order], numbers[order])
    assert shuffled.value == pytest.approx(mean_interval(values, numbers).value)
    assert group_index(["b", "a", "b", ("c", 1)], 4).tolist() == [0, 1, 0, 2]


def test_paired_difference_ignores_what_prompts_have_in_common() -> None:
    common = RNG.normal(0, 5, 300)
    first, second = common + RNG.normal(0, 1, 300), common + 2 + RNG.normal(0, 1, 300)
    paired = difference_interval(first, second)
    single = mean_interval(second - first)
    assert paired.value == pytest.approx(single.value)
    assert (paired.low, paired.high) == pytest.approx((single.low, single.high))


def test_ratio_follows_the_delta_method() -> None:
    first = RNG.normal(10, 1, 400)
    second = 0.5 * first + RNG.normal(0, 0.3, 400)
    found = ratio_interval(first, second, resamples=20_000)
    ratio = second.mean() / first.mean()
    half = T_975[199] * (second - ratio * first).std(ddof=1) / first.mean() / math.sqrt(400)
    assert found.value == pytest.approx(ratio)
    assert (found.low, found.high) == pytest.approx((ratio - half, ratio + half), abs=0.05 * half)


def test_ratio_to_nothing() -> None:
    rare = np.array([0.0, 0.0, 0.0, 1.0])
    found = ratio_interval(rare, np.ones(4))
    assert found.value == 4 and found.high == math.inf and 0 < found.low < 4
    assert ratio_interval(np.zeros(4), np.ones(4)).value == math.inf
    nothing = ratio_interval(np.zeros(4), np.zeros(4))
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and math.isnan(nothing.high)


def test_equal_values() -> None:
    assert mean_interval(np.full(30, 0.7)) == Estimate(*[pytest.approx(0.7)] * 3)
    assert difference_interval(np.full(9, 2.0), np.full(9, 5.0)) == Estimate(3, 3, 3)


def test_a_share_of_none_or_all_is_not_certain() -> None:
    none, everything = share_interval([False] * 200, np.arange(200) % 10), share_interval([True] * 200)
    assert (none.value, none.low) == (0, 0)
    assert (1 - none.high) ** 200 == pytest.approx(0.05)
    assert none.high == pytest.approx(3 / 200, rel=0.02)
    assert (everything.value, everything.high) == (1, 1)
    assert everything.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(
    ("before", "after", "value"), [(True, False, -1), (False, True, 1), (True, True, 0), (False, False, 0)]
)
def test_a_difference_of_pictures_that_are_all_alike_is_not_certain(before: bool, after: bool, value: int) -> None:
    groups = np.arange(200) % 10
    found = share_difference([before] * 200, [after] * 200, groups)
    # the rule of three
    margin = pytest.approx(3 / 200, rel=0.02)
    assert found.value == value
    assert (found.low, found.high) == (max(-1.0, value - unseen_share(200)), min(1.0, value + unseen_share(200)))
    assert found.high - value == (0 if value == 1 else margin) and value - found.low == (0 if value == -1 else margin)


def test_a_ratio_of_pictures_that_are_all_alike_is_not_certain() -> None:
    groups, hits = np.arange(200) % 10, np.arange(200) < 150
    everything = share_ratio([True] * 200, [True] * 200, groups)
    assert (everything.value, everything.low, everything.high) == (1, 1 - unseen_share(200), 1 + unseen_share(200))
    same = share_ratio(hits, hits, groups)
    # an unseen share of all pictures is a larger one of the three quarters
    assert same.high - 1 == pytest.approx(4 / 3 * unseen_share(200)) and same.low == pytest.approx(2 - same.high)
    nothing = share_ratio(hits, [False] * 200, groups)
    assert (nothing.value, nothing.low) == (0, 0) and nothing.high == pytest.approx(4 / 3 * unseen_share(200))
    for second in (hits, [False] * 200):
        found = share_ratio([False] * 200, second, groups)
        assert not math.isfinite(found.value) and not found.low < found.high


def test_a_share_of_pictures_that_differ_is_resampled_as_any_other_figure() -> None:
    before, after = RNG.random(200) < 0.8, RNG.random(200) < 0.3
    groups = np.arange(200) % 10
    assert share_difference(before, after, groups) == difference_interval(before, after, groups)
    assert share_ratio(before, after, groups) == ratio_interval(before, after, groups)


def test_prompts_that_all_change_alike_claim_no_certainty_for_the_noise_of_rounding() -> None:
    # every prompt loses one picture of ten, from another number of hits
    before = [place < hits for hits in (3, 7, 9) for place in range(10)]
    after = [place < hits - 1 for hits in (3, 7, 9) for place in range(10)]
    found = share_difference(before, after, np.repeat(np.arange(3), 10))
    assert found.high - found.low == pytest.approx(2 * unseen_share(30))


def test_one_group_gives_no_interval() -> None:
    for found in (mean_interval([0.3]), mean_interval([0.2, 0.4], ["a", "a"]), difference_interval([0.1], [0.4])):
        assert found.value == pytest.approx(0.3)
        assert math.isnan(found.low) and math.isnan(found.high)


def test_seed_decides_everything() -> None:
    values = RNG.normal(0, 1, 50)
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)
    assert mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_many_values_are_resampled_in_parts() -> None:
    values = RNG.normal(0, 1, 30_000)
    found = mean_interval(values, resamples=400)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(30_000), rel=0.15)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan]])
def test_other_values_are_refused(values: list) -> None:
    with pytest.raises(ValueError, match="values"):
        mean_interval(values)


def test_lengths_must_agree() -> None:
    for compared in (difference_interval, ratio_interval, share_difference, share_ratio):
        with pytest.raises(ValueError, match="two equal lengths, not 2 and 1"):
            compared([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="3 groups for 2 values"):
        mean_interval([1.0, 2.0], ["a", "b", "c"])
