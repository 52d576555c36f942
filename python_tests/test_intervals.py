"""Bootstrap intervals: they cover what they should, pairs are narrower, draws are seeded."""

import math

import pytest
import torch

from moeprune_ext.intervals import Interval, bootstrap_interval, paired_gain, resamples


def normal(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        interval = bootstrap_interval(normal(30, seed) + 3, draws=400, seed=seed)
        covered += interval.low <= 3 <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


def test_the_interval_of_a_mean_is_the_textbook_one_for_many_values():
    values = normal(500, 0)
    interval = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / math.sqrt(500)
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.high - interval.value == pytest.approx(half, rel=0.15)
    assert interval.value - interval.low == pytest.approx(half, rel=0.15)


def test_a_mean_is_weighted_by_positions():
    sums, weights = torch.tensor([8.0, 1.0, 3.0]), torch.tensor([8, 2, 6])
    interval = bootstrap_interval(sums, weights)
    assert interval.value == pytest.approx(12 / 16)
    assert 0.5 <= interval.low < interval.value < interval.high <= 1


def test_what_is_hard_for_both_drops_out_of_a_paired_gain():
    hard = 100 * normal(20, 1)
    gain = paired_gain(hard + 1, hard)
    assert (gain.value, gain.low, gain.high) == pytest.approx((1, 1, 1)) and gain.above_zero
    assert not paired_gain(normal(20, 2), normal(20, 3)).above_zero


def test_draws_are_seeded_and_stay_in_their_groups():
    groups = [[0, 3, 4], [1, 2]]
    times = resamples(5, groups=groups, draws=50, seed=1)
    assert torch.equal(times, resamples(5, groups=groups, draws=50, seed=1))
    assert not torch.equal(times, resamples(5, groups=groups, draws=50, seed=2))
    for group in groups:
        assert bool((times[:, group].sum(1) == len(group)).all())
    assert bool((resamples(5, draws=50).sum(1) == 5).all())


def test_one_value_or_a_broken_one_has_no_interval():
    for interval in (bootstrap_interval(torch.tensor([2.0])), bootstrap_interval(torch.tensor([1.0, math.nan]))):
        assert math.isnan(interval.low) and math.isnan(interval.high) and not interval.above_zero
    assert Interval.from_json(Interval(1.0, math.nan, 2.0).as_json()).high == 2
