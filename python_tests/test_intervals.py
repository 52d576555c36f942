"""Bootstrap intervals: they cover what they should, pairs are narrower, draws are seeded."""

import math

import pytest
import torch

from moeprune_ext.intervals import (
    Interval,
    bootstrap_interval,
    exp_interval,
    paired_gain,
    resamples,
    shares_right,
    wilson,
)


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
    groups = [[0, 3, 4, 6], [1, 2, 5, 7]]
    times = resamples(8, groups=groups, draws=50, seed=1)
    assert torch.equal(times, resamples(8, groups=groups, draws=50, seed=1))
    assert not torch.equal(times, resamples(8, groups=groups, draws=50, seed=2))
    for group in groups:
        assert bool((times[:, group].sum(1) == len(group)).all())
    assert bool((resamples(5, draws=50).sum(1) == 5).all())


def test_one_value_or_a_broken_one_has_no_interval():
    for interval in (bootstrap_interval(torch.tensor([2.0])), bootstrap_interval(torch.tensor([1.0, math.nan]))):
        assert math.isnan(interval.low) and math.isnan(interval.high) and not interval.above_zero
    assert Interval.from_json(Interval(1.0, math.nan, 2.0).as_json()).high == 2


def test_wilsons_interval_covers_a_share_about_as_often_as_it_says_and_has_a_width_at_both_ends():
    generator = torch.Generator().manual_seed(0)
    for share in (0.03, 0.5, 0.9):
        draws = (torch.rand(2000, 60, generator=generator) < share).sum(1).tolist()
        covered = [interval.low <= share <= interval.high for interval in (wilson(right, 60) for right in draws)]
        assert 0.92 <= sum(covered) / len(covered) <= 0.99
    none, every = wilson(0, 60), wilson(60, 60)
    assert none.low == 0 < none.high < 0.1 and 0.9 < every.low < every.high == 1
    assert none.high == pytest.approx(1 - every.low)
    assert wilson(30, 60).standard_error == pytest.approx(math.sqrt(0.25 / 60))
    with pytest.raises(ValueError, match="no share"):
        wilson(61, 60)


def test_accuracies_of_splits_have_intervals_unless_they_are_not_numbers():
    intervals = shares_right({"train": 0.75, "test": math.nan}, {"train": 8, "test": 4})
    assert intervals["train"] == wilson(6, 8) and math.isnan(intervals["test"].low)


def test_the_standard_error_is_the_spread_of_the_draws():
    values = normal(500, 1)
    interval = bootstrap_interval(values)
    assert interval.standard_error == pytest.approx(float(values.std()) / math.sqrt(500), rel=0.1)
    assert Interval.from_json(interval.as_json()) == interval
    earlier = {name: value for name, value in interval.as_json().items() if name != "standard_error"}
    assert math.isnan(Interval.from_json(earlier).standard_error)


def test_a_perplexitys_interval_is_that_of_its_logarithm():
    sums, weights = normal(40, 2) + 60, torch.full((40,), 20.0)
    mean, perplexity = bootstrap_interval(sums, weights), exp_interval(sums, weights)
    for end in ("value", "low", "high"):
        assert math.log(getattr(perplexity, end)) == pytest.approx(getattr(mean, end), rel=1e-4)


def test_an_interval_is_written_behind_its_value():
    assert f"{Interval(0.6333, 0.5781, 0.6887):.1%}" == "63.3% (57.8 to 68.9)"
    assert f"{Interval(4.5, 4.25, 5):.2f}" == "4.50 (4.25 to 5.00)"
    assert f"{Interval(4.5, math.nan, math.nan):.2f}" == "4.50"


def test_groups_too_small_to_show_spread_are_drawn_together():
    sums, groups = torch.arange(8.0), [[i] for i in range(8)]
    alone, together = (bootstrap_interval(sums, groups=its) for its in (groups, None))
    assert (alone.low, alone.high) == (together.low, together.high) and alone.low < alone.value < alone.high
    large = [list(range(4)), list(range(4, 8))]
    assert bootstrap_interval(sums, groups=large).high < together.high  # the spread between groups is not drawn
